"""All models at one budget: gaps with their two kinds of chance, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.paper.one_budget import Runs, one_budget_section


def run(
    variant: str, loss: float, seed: int = 1, step: float = 0.0, total: int = 2000
) -> dict[str, Any]:
    """Two texts of 20 documents of 100 tokens; ``step`` is by how much documents differ."""
    nll = [100 * (loss + step * (n % 2 * 2 - 1)) for n in range(20)]
    text = {"nll": nll, "tokens": [100] * 20, "bytes": 6000}
    tokens = [1000 * n for n in range(1, 21)]
    training = {"tokens": tokens, "loss": [5.0 + loss * (n - 9.5) for n in range(20)]}
    return {
        "variant": f"{variant}-narrow",
        "seed": seed,
        "model": {"active": 1e5, "total": total, "layers": 2, "width": 8, "vocabulary": 99},
        "figures": {
            "documents": {"Wikipedia": text, "novels": text},
            "training": training,
            "tokens_seen": 20_000,
        },
    }


def entries(*runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{each['variant']}-s{each['seed']}": each for each in runs}


def test_a_difference_that_documents_share_is_told_and_one_they_do_not_is_not() -> None:
    alike = Runs(entries(run("base", 3.0, step=0.5), run("memoryllm", 3.01, step=0.5)))
    gap = alike.gap("memoryllm", "base")
    assert gap.nats == pytest.approx(0.01)
    assert gap.verdict == "yes, in one run each"
    assert alike.gap("base", "memoryllm").verdict == "no, the reverse, in one run each"
    unlike = Runs(entries(run("base", 3.0, step=0.5), run("memoryllm", 3.01)))
    gap = unlike.gap("memoryllm", "base")
    assert gap.low < 0 < gap.high
    assert gap.verdict == "cannot be told"


def test_a_difference_within_the_noise_of_seeds_is_not_told() -> None:
    seeds = [run("base", 3.0), run("base", 3.4, 2), run("memoryllm", 3.3), run("memoryllm", 3.5, 2)]
    gap = Runs(entries(*seeds)).gap("memoryllm", "base")
    assert gap.low > 0
    assert gap.verdict == "cannot be told"
    steady = [run("base", 3.0), run("base", 3.001, 2), run("memoryllm", 3.3)]
    assert Runs(entries(*steady)).gap("memoryllm", "base").verdict == "yes"


def test_both_comparisons_and_the_control_are_said() -> None:
    losses = {"base": 3.0, "memoryllm": 3.1, "base-active": 3.2, "attention-only": 3.5}
    section = one_budget_section(entries(*(run(*each) for each in losses.items())), 4.9)
    verdicts = [claim.verdict for claim in section.claims]
    assert verdicts == ["yes, in one run each", "-", "yes, in one run each", "-"]
    assert "give back 80% of what" in section.text
    assert "10.0 tokens for each of Base's 2,000 layer parameters (4.9 in" in section.text
    assert "| attention only | 100.0 k |" in section.text
    assert "paper-one-budget.svg" in section.pictures


def test_where_base_overtakes_is_read_off_the_training() -> None:
    """The gap grows by 0.1 a record, and turns between the tenth and the eleventh."""
    section = one_budget_section(entries(run("base", 3.0), run("memoryllm", 3.1)))
    assert "overtakes MemoryLLM's for good at 0.01 M tokens, 5.5 for each" in section.text
    ahead = one_budget_section(entries(run("base", 3.1), run("memoryllm", 3.0)))
    assert "does not overtake MemoryLLM's" in ahead.text


def test_equal_total_parameters_are_looked_at_and_not_taken_for_granted() -> None:
    wide = run("memoryllm", 3.1, total=3300)
    wide["model"]["changes"] = ["FFN-M 2 times as wide"]
    section = one_budget_section(entries(run("base", 3.0), wide, run("base-active", 3.2)))
    assert section.claims[0].here == "not measured: these runs do not have as many"
    assert section.claims[2].verdict == "yes, in one run each"
    assert "worse than Base at equal total, not measured; better at" in section.text
    assert "| MemoryLLM, FFN-M 2 times as wide | 100.0 k | 3.3 k |" in section.text
