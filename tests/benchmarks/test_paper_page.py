"""The paper's page: figures come from stored results, those from runs, and claims are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.paper.page as page
from benchmarks.paper import judging, measure
from benchmarks.paper.__main__ import main
from benchmarks.paper.page import decode_section
from benchmarks.paper.quality import Samples, longer_section, quality_section
from benchmarks.paper.store import Results
from benchmarks.paper.sweeps import bits_section, gain_section, layers_section
from support.documents import commands, parses, words_of


def test_page_and_pictures_are_of_the_stored_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--check"]) == 0, capsys.readouterr().err


def test_a_page_of_other_figures_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "paper.md")
    assert main(["page", "--check"]) == 1
    assert "paper.md: not of today" in capsys.readouterr().err
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    assert main(["page"]) == 0
    assert main(["page", "--check"]) == 0


def test_every_command_of_the_page_is_one_that_exists() -> None:
    text = page.PAGE.read_text("utf-8")
    found = list(commands(text))
    assert all(parses(words_of(command)) for command in found)


def test_without_figures_everything_is_shown_as_missing(tmp_path: Path) -> None:
    (path, text), *pictures = page.page_files(tmp_path).items()
    assert path == page.PAGE
    assert pictures == []
    assert text.count("not measured") >= 6


def test_noise_is_pooled_and_decides() -> None:
    samples = Samples({"a": [1.0, 1.2], "b": [2.0, 2.0], "c": [1.3, 1.1]})
    assert samples.noise() == pytest.approx((0.04 / 3) ** 0.5)
    assert (samples.degrees, samples.critical) == (3, 3.182)
    assert samples.is_larger("b", "a") == "yes"
    assert samples.is_larger("a", "b") == "no, the reverse"
    assert samples.is_larger("c", "a") == "cannot be told"
    one = Samples({"a": [1.0], "b": [2.0]})
    assert one.noise() is None
    assert [one.is_larger("b", "a"), one.is_larger("a", "b")] == [
        "yes, in one run each",
        "no, in one run each",
    ]


def test_few_seeds_ask_for_more_standard_errors() -> None:
    """Two and a half of them are noise with three degrees of freedom, and none with ten."""
    few = Samples({"a": [0.0, 0.2], "b": [0.36, 0.56], "c": [0.0, 0.2]})
    assert few.degrees == 3
    found, error = few.difference("b", "a")
    assert error is not None
    assert 2 < found / error < few.critical
    assert few.is_larger("b", "a") == "cannot be told"
    many = Samples({**few.by_variant, **{str(n): [0.0, 0.2] for n in range(8)}})
    assert many.critical == 2.228
    assert many.is_larger("b", "a") == "yes"


def entry(variant: str, figures: dict[str, Any], seed: int = 1, **model: Any) -> dict[str, Any]:
    shape = {"beta": 0, "active": 4e5, "total": 1.2e6, "changes": [], **model}
    return {"variant": variant, "seed": seed, "model": shape, "figures": figures}


def texts(perplexity: float) -> dict[str, Any]:
    figures = {
        "perplexity": perplexity,
        "nll_per_token": float(np.log(perplexity)),
        "bits_per_byte": 1.0,
    }
    return dict.fromkeys((*judging.TEXTS, "together"), figures)


def trained(variant: str, seed: int, perplexity: float, **model: Any) -> dict[str, Any]:
    training = {"tokens": [10**6, 2 * 10**6], "loss": [5.0, 4.0]}
    figures = {"texts": texts(perplexity), "training": training, "tokens_seen": 2e6}
    return entry(variant, figures, seed, **model)


def test_orderings_are_judged_with_the_spread_of_seeds() -> None:
    entries = {
        f"{variant}-s{seed}": trained(variant, seed, value + seed / 10)
        for variant, value in (("base", 50), ("memoryllm", 60), ("base-active", 60.01))
        for seed in (1, 2)
    }
    found = {claim.paper: claim for claim in quality_section(entries).claims}
    assert found["Base better than MemoryLLM at equal total parameters"].verdict == "yes"
    small = "MemoryLLM better than Base at equal active parameters"
    assert found[small].verdict == "cannot be told"
    assert found["Flex-2 better than Flex-1 at equal total parameters"].here == "not measured"


def test_longer_trainings_stand_beside_the_shorter_ones() -> None:
    runs = [trained("base", 1, 50), trained("base-long", 1, 30), trained("memoryllm-long", 1, 33)]
    for run in runs:
        run["figures"]["training"]["settings"] = {"steps": 2100}
    section = longer_section({f"{run['variant']}-s1": run for run in runs})
    assert [claim.verdict for claim in section.claims] == ["yes, in one run each"]
    assert "| Base | 2.0 | 30.00 | 50.00 | `edge-memllm train" in section.text
    assert "--out runs/base-long-s1 --set training.steps=2100` |" in section.text
    assert "| MemoryLLM | 2.0 | 33.00 | not measured |" in section.text
    assert "paper-longer.svg" in section.pictures
    assert "#one-budget" in section.text


def test_longer_trainings_of_smaller_models_are_compared_at_that_length() -> None:
    sizes = {"base-long": 30, "memoryllm-long": 33, "base-active-long": 36}
    runs = [trained(name, 1, value) for name, value in sizes.items()]
    for run in runs:
        run["figures"]["training"]["settings"] = {"steps": 2100}
    section = longer_section({f"{run['variant']}-s1": run for run in runs})
    assert [claim.verdict for claim in section.claims] == ["yes, in one run each"] * 2
    assert "equal active parameters, trained for longer" in section.claims[1].paper
    assert "#one-budget" not in section.text


def test_ablations_stand_against_the_run_of_their_seed(tmp_path: Path) -> None:
    results = Results("perplexity", tmp_path)
    for run in (
        trained("memoryllm", 1, 50),
        trained("memoryllm", 2, 50.5),
        trained("abl-wide", 1, 40, changes=["FFN-M 2 times as wide"]),
        trained("abl-alone", 3, 40),
    ):
        results.put(f"{run['variant']}-s{run['seed']}", run | {"model": shape(run["model"])})
    text = page.page_files(tmp_path)[page.PAGE]
    assert (
        "| FFN-M 2 times as wide | MemoryLLM | 1 | 40.00 | 50.00 | -0.2231 | yes, better |" in text
    )
    assert "| alone | MemoryLLM | 3 | 40.00 | not measured | - | - |" in text


def shape(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": 2,
        "width": 8,
        "vocabulary": 300,
        "memory_width": 20,
        "memory_rows": 2,
        **model,
    }


def test_a_smaller_factor_is_judged_by_text_and_by_tasks_above_chance() -> None:
    def points(worst: float, acc: float) -> dict[str, Any]:
        score = {"acc": acc, "acc_stderr": 0.01}
        tasks = dict.fromkeys(("ARC-Easy", "Winogrande", "PIQA", "BLiMP"), score)
        tasks["LAMBADA"] = {"perplexity": 100.0}
        return {
            "gains": [
                {"gain": gain, "texts": texts(value), "tasks": tasks}
                for gain, value in zip(
                    (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), np.linspace(50, worst, 6), strict=True
                )
            ]
        }

    runs = {"a": entry("base", points(200, 0.5)), "b": entry("memoryllm", points(100, 0.5))}
    section = gain_section(runs)
    less, recall = section.claims
    assert (less.verdict, less.here) == ("yes", "perplexity x 2.00 against x 4.00")
    assert recall.verdict == "cannot be told at this size"
    assert "at chance, so without meaning, Winogrande, PIQA, BLiMP" in section.text
    able = gain_section({"b": entry("memoryllm", points(100, 0.6))})
    assert [claim.verdict for claim in able.claims] == ["-", "see the table"]


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        ([0.5, 0.01, 0.01, 0.02], "yes"),
        ([0.5, 0.1, 0.1, 0.2], "the first does, middle ones are not free"),
        ([0.1, 0.1, 0.1, 0.2], "no"),
    ],
)
def test_the_shape_of_leaving_layers_out(costs: list[float], verdict: str) -> None:
    def figures(costs: list[float]) -> dict[str, Any]:
        return {"whole": texts(50), "layers": [texts(50 * (1 + cost)) for cost in costs]}

    section = layers_section({"a": entry("memoryllm", figures(costs))})
    assert [claim.verdict for claim in section.claims] == [verdict, "-"]
    bowl = layers_section({"a": entry("base", figures([0.5, 0.0001, 0.1, 0.4]))})
    assert [claim.verdict for claim in bowl.claims] == ["-", "yes"]


def test_bits_are_judged_against_the_exact_table() -> None:
    stored = {
        word: {"id": word, "bits_per_value": 8.0, "texts": texts(50 * cost)}
        for word, cost in (("f32", 1.0), ("int8", 1.0005), ("int4", 1.02))
    }
    section = bits_section({"a": entry("memoryllm", {"codecs": stored})})
    assert [claim.verdict for claim in section.claims] == ["yes", "no"]
    assert "+2.00%" in section.text


def test_decoding_is_compared_with_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int, Path]] = []
    monkeypatch.setattr(measure, "make_synthetic", lambda *words: made.append(words))
    monkeypatch.setattr(
        measure, "_bench", lambda base, other, _: bench_report(25 if "flex" in other.name else 100)
    )
    (tmp_path / "tiny-base").mkdir()
    list(measure.measure_decoding("tiny", tmp_path, [], tmp_path))
    assert [beta for _, beta, _ in made] == [3, 2, 1, 0]
    section = decode_section(Results("decode", tmp_path).all())
    for name, ms in (("MemoryLLM", "10.00"), ("Flex-3", "40.00")):
        row = f"| {name} | 5.00 (Base {ms}) | 2.00x (1.90 to 2.10) | 900 (Base 400) | 100 (Base"
        assert row in section.text
    assert section.claims[0].verdict == "faster and smaller, yes"
    assert "Base itself took 10.00 to 40.00 ms" in section.text


def bench_report(base_speed: float) -> dict[str, Any]:
    """Of a model, and of the Base that it was measured in turns with."""
    cell = {
        **dict.fromkeys(measure._KEPT, 0),
        "decode_tokens_per_second": 200.0,
        "prefill_tokens_per_second": 900.0,
        "rss_anon_bytes": 10**8,
        "model": {"graph_weights": "int4", "codec": "int8-g64"},
    }
    base = cell | {
        "decode_tokens_per_second": base_speed,
        "prefill_tokens_per_second": 400.0,
        "rss_anon_bytes": 3 * 10**8,
    }
    ratio = {"ratio": 2.0, "low": 1.9, "high": 2.1, "text": "2.00x (1.90 to 2.10)"}
    return {
        "variants": [cell | {"name": "A warm"}, base | {"name": "B warm"}],
        "comparisons": [{"decode": ratio}],
        "repeats": 5,
        "environment": {"processor": "one", "load_average": 0.0},
    }


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["page", "--colour"])
    assert "unknown: --colour" in capsys.readouterr().err
