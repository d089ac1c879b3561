"""The picture and the figures of docs/performance.md come from the report beside them."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from support import ROOT

DOCS = ROOT / "docs"
SCRIPT = runpy.run_path(str(DOCS / "roofline.py"))


@pytest.fixture
def report() -> dict[str, Any]:
    found = json.loads((DOCS / "results" / "roofline.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def test_page_and_picture_are_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPT["main"](["--check"]) == 0, capsys.readouterr().err


def test_a_page_of_another_report_is_noticed(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report["variants"][0]["decode_tokens_per_second"] += 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    names = SCRIPT["main"].__globals__
    before, names["REPORT"] = names["REPORT"], tmp_path / "report.json"
    try:
        assert SCRIPT["main"](["--check"]) == 1
    finally:
        names["REPORT"] = before
    assert "roofline.svg, performance.md: not of today" in capsys.readouterr().err


def test_every_median_is_a_mark_below_or_above_a_curve(report: dict[str, Any]) -> None:
    dense = copy.deepcopy(report["variants"][0])
    dense |= {"name": "B <dense>", "model": dense["model"] | {"identity": "x", "beta": 8}}
    report["variants"].append(dense)
    root = ElementTree.fromstring(SCRIPT["picture"](report))
    name = "{http://www.w3.org/2000/svg}"
    names = {cell["name"] for cell in report["variants"]}
    assert len(root.findall(f"{name}circle")) == len(report["variants"]) + len(names)
    curves = [each for each in root.iter(f"{name}path") if "limit" in each.get("class", "")]
    assert len(curves) == 4  # two models, and four fifths of each
    texts = {each.text for each in root.iter(f"{name}text")}
    assert {"B <dense>", "limit, MemoryLLM", "limit, dense"} <= texts


@pytest.mark.parametrize(
    ("highest", "ticks"), [(105, [0, 20, 40, 60, 80, 100, 120]), (4.4, [0, 1, 2, 3, 4, 5])]
)
def test_ticks_are_round(highest: float, ticks: list[float]) -> None:
    assert SCRIPT["_ticks"](highest) == ticks


def test_a_report_without_a_device_has_no_line_of_it(report: dict[str, Any]) -> None:
    assert "The device takes" in SCRIPT["figures"](report)
    report["storage"][0]["records"] = {"not_measured": "no O_DIRECT"}
    assert "The device takes" not in SCRIPT["figures"](report)
