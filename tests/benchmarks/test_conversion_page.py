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
