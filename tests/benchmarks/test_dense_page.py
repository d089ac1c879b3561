"""The pages on dense models and rows say what the stored figures say, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dense import page
from benchmarks.dense.__main__ import main
from benchmarks.dense.first_page import first_page
from support.documents import commands, parses, words_of


def test_pages_are_of_the_stored_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--check"]) == 0, capsys.readouterr().err


def test_commands_of_the_pages_are_ones_that_exist() -> None:
    for path, text in page.page_files().items():
        if path.suffix == ".md":
            assert all(parses(words_of(command)) for command in commands(text))


def gap(mean: float, error: float = 0.01) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 2 * error, "high": mean + 2 * error, "documents": 20}


def layers(shares: list[float]) -> dict[str, Any]:
    damage = {
        name: {"nats": nats, "error": 0.01}
        for name, nats in (("table", 0.1), ("dropped", 0.4), ("alone", 0.5))
    }
    return {
        "fit_tokens": 5000,
        "distinct": 700,
        "judged_tokens": 510,
        "window": 256,
        "seen": 0.9,
        "loss": 3.0,
        "layers": [
            {
                "layer": number,
                "token_share": share - 0.1,
                "seen_share": share,
                "shrinkage": 2.0,
                "damage": damage,
            }
            for number, share in enumerate(shares)
        ],
    }


def test_a_layer_is_a_table_from_nine_tenths_on() -> None:
    text = page.layers_page(layers([0.95, 0.5, 0.2]))
    assert "**Of 3 layers 1 is a table** (R2 of 0.9 or more): 0." in text
    assert "Of the others the token decides 20% to 50%" in text
    assert "| 0 | 0.95 | 0.85 | 2 | +0.100 ± 0.010 | +0.400 ± 0.010 |" in text
    assert "| 75% |" in text
    assert "0 are tables** (R2 of 0.9 or more): none." in page.layers_page(layers([0.5, 0.2]))


def control(rows: float) -> dict[str, Any]:
    stage = {
        "control": {"loss": 3.9, "difference": gap(0.4)},
        "rows": {"loss": 3.9 + rows, "difference": gap(0.4 + rows)},
        "rows against control": {"loss": 3.9 + rows, "difference": gap(rows)},
    }
    return {
        "dense": {"loss": 3.5, "difference": gap(0.0, 0.0)},
        "steps": {"planned": 8, "made": 8},
        "tokens": 1000,
        "row_values": 10**6,
        "parameters": {"rows": 10**6},
        "fitted": stage,
        "distilled": stage,
        "size": {
            "rows": 100,
            "fitted": 4,
            "length": 32,
            "batch": 4,
            "rate": 1e-3,
            "held_out": 8,
        },
        "model": {"neurons": 1536, "width": 576, "layers": 30},
    }


@pytest.mark.parametrize(
    ("rows", "words"),
    [(-0.1, "they help (-0.100"), (0.1, "they hurt (+0.100"), (0.01, "they make no difference")],
)
def test_rows_are_judged_against_their_control(rows: float, words: str) -> None:
    assert words in page.control_page(control(rows))
    assert "was stopped" not in page.control_page(control(rows))
    short = {**control(rows), "steps": {"planned": 8, "made": 4}}
    assert "was stopped after 4 of 8 steps" in page.control_page(short)


def retrofit(rows: float, lora: float, chosen: float = -0.1) -> dict[str, Any]:
    def judged(mean: float) -> dict[str, Any]:
        return {"loss": 3.0 + mean, "against_nothing": gap(mean)}

    parts = ("first token alone", "without the first token", "first third of the layers")
    return {
        "base": judged(0.0),
        "rows": {
            "rate": 0.01,
            "search": {"0.01": 3.0},
            "all": judged(rows),
            **{name: judged(rows / 2) for name in parts},
        },
        "lora": {"rate": 0.001, "search": {"0.001": 2.9}, "all": judged(lora)},
        "rows_against_lora": {
            "all": gap(rows - lora),
            "chosen elsewhere": gap(chosen),
        },
        "size": {"rank": 8, "batch": 4, "length": 32, "held_out": 8},
        "documents": {"learned": 9, "held_out": 3},
        "learned_tokens": 1000,
        "steps": 8,
        "row_tokens": 10,
    }


def test_a_yes_needs_more_than_lora_and_more_than_nothing() -> None:
    yes = page._retrofit_verdict(retrofit(-0.3, -0.1))
    assert "rows help: -0.300" in yes
    assert "yes, at this budget" in yes
    assert "**The verdict: no.**" in page._retrofit_verdict(retrofit(-0.1, -0.3))
    assert "**The verdict: no.**" in page._retrofit_verdict(retrofit(-0.3, -0.1, 0.1))
    once = page._retrofit_verdict(retrofit(-0.3, -0.1, 0.0))
    assert "**The verdict: cannot be told from LoRA.**" in once
    near = page._retrofit_verdict(retrofit(-0.3, -0.299))
    assert "**The verdict: cannot be told from LoRA.**" in near
    alone = retrofit(-0.3, -0.1)
    del alone["lora"]
    assert "**The verdict: not a yes.**" in page._retrofit_verdict(alone)
    assert "| LoRA, rank 8 | not measured |" in page.retrofit_page(alone)
    neither = page._retrofit_verdict(retrofit(0.01, 0.2))
    assert "rows make no difference that can be told" in neither
    assert "**The verdict: no.**" in neither


def test_a_page_whose_figures_are_not_there_is_left_out(tmp_path: Path) -> None:
    assert page.page_files(tmp_path) == {}
    (tmp_path / page.CONTROL.name).write_text(json.dumps(control(0.1)))
    assert [path.name for path in page.page_files(tmp_path)] == ["conversion-control.md"]


def first(lost: dict[str, Any], ratio: tuple[float, float] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dense": 3.0,
        "documents": 20,
        "seen": 0.9,
        "tokens": {"learned": 1000, "judged": 500},
        "size": {"narrow": 19, "fitted": 2, "length": 32},
        "model": {"width": 10, "neurons": 100, "vocabulary": 500, "parameters": 100_000},
        "replacements": {
            name: {"strength": 1.0, "difference": lost}
            for name in ("table", "19 neurons", "nothing")
        },
    }
    if ratio is not None:
        side = {
            "graph_bytes": 10_000_000,
            "table_bytes": 10**6,
            "table_bytes_read_per_token": 100,
            "decode_tokens_per_second": 50.0,
            "prefill_tokens_per_second": 500.0,
            "threads": 1,
        }
        low, high = ratio
        told = {"low": low, "high": high, "text": f"({low} to {high})"}
        found["artifacts"] = {
            "decode": told,
            "prefill": told,
            "rounds": 5,
            "processor": "one",
            "dense": side,
            "table": side | {"graph_bytes": 9_000_000, "table_bytes": 3 * 10**6},
        }
    return found


def test_what_one_layer_saves_is_said_beside_what_it_costs() -> None:
    text = first_page(first(gap(0.1)))
    assert "a table costs +0.100 (+0.080 to +0.120) nats" in text
    assert "out of what is computed for each token" in text.replace("\n", " ")
    assert "**3.0%**" in text
    assert "was not measured" in text
    assert "| table | 22.20 | +0.100 (+0.080 to +0.120) | 0 | 5,000 |" in text
    assert "| 19 neurons | 22.20 | +0.100 (+0.080 to +0.120) | 570 | 0 |" in text
    assert "costs nothing that can be told" in first_page(first(gap(0.01)))


@pytest.mark.parametrize(
    ("ratio", "words"),
    [((1.01, 1.03), "it decodes (1.01 to 1.03) as fast"), ((0.99, 1.03), "no faster that could")],
)
def test_a_speed_is_told_only_beyond_its_interval(ratio: tuple[float, float], words: str) -> None:
    text = first_page(first(gap(0.1), ratio))
    assert words in text
    assert "its graph is 1.0 MB smaller and its table 2.0 MB larger" in text
