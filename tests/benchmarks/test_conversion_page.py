"""The page of the conversion's figures is made of the stored ones, and says what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import conversion, conversion_page


@pytest.fixture
def results() -> dict[str, Any]:
    return json.loads(conversion.RESULTS.read_text("utf-8"))


def test_the_page_is_made_of_the_stored_figures() -> None:
    assert conversion.main(["page", "--check"]) == 0


def test_a_page_of_other_figures_is_noticed(
    results: dict[str, Any], tmp_path: Any, monkeypatch: Any
) -> None:
    results["dense"]["loss"] += 0.1
    (tmp_path / "other.json").write_text(json.dumps(results))
    monkeypatch.setattr(conversion, "RESULTS", tmp_path / "other.json")
    assert conversion.main(["page", "--check"]) == 1


def test_reading_says_when_training_from_scratch_is_as_good(results: dict[str, Any]) -> None:
    scratch = {"history": [[1_000_000, 6.0], [2_000_000, 5.0]], "tokens_seen": 2_000_000}
    student = {"name": "x", "points": [[0, 5.5], [300_000, 4.0]]}
    scratch |= {"name": "x", "loss": 5.1}
    made = {**results, "students": [student], "scratch": [scratch]}
    (line,) = conversion_page._reading(made)
    assert "fitted it is where training from scratch is after about 2.0 million tokens" in line
    assert "0.30 million tokens of distillation where that is after more than 2.0" in line


def gap(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "documents": 20}


def one_layer(lost: float) -> dict[str, Any]:
    return {
        "size": {"narrow": 19},
        "model": {"width": 10, "neurons": 100, "vocabulary": 500, "parameters": 100_000},
        "replacements": {
            "table": {"difference": gap(lost)},
            "19 neurons": {"difference": gap(0.5)},
        },
    }


def all_layers(rows: float) -> dict[str, Any]:
    return {
        "tokens": 1000,
        "model": {"width": 10, "neurons": 100},
        "distilled": {
            "rows": {"difference": gap(1.0)},
            "rows against control": {"difference": gap(rows)},
        },
    }


@pytest.mark.parametrize(
    ("lost", "rows", "words"),
    [
        (0.0, 0.1, "**So**: a layer that [is a table](layers.md) can go to storage"),
        (0.1, 0.1, "even the layer that is a table loses +0.100"),
        (0.0, 0.1, "but one layer is little: 3.0% of the parameters"),
        (0.0, 0.1, "rows are worse than none (+0.100"),
        (0.0, 0.0, "rows are no difference that can be told"),
        (0.0, -0.1, "rows were better than none, and the dense model was better yet"),
    ],
)
def test_when_converting_pays_is_said_by_both_controls(
    lost: float, rows: float, words: str
) -> None:
    assert words in "\n".join(conversion_page._when(one_layer(lost), all_layers(rows)))


def test_without_figures_of_a_real_model_nothing_is_said_of_one(results: dict[str, Any]) -> None:
    assert "When does converting pay" not in conversion_page.page(results)
