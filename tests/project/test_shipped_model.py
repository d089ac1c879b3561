"""The trained model that comes along: loadable, small, described, and as good as its card says."""

from __future__ import annotations

import json
import re

import pytest

from edge_memllm_export import ExportReport, export_model
from support import ROOT

MODEL = ROOT / "examples/tiny-english"
CARD = (MODEL / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_model(MODEL, tmp_path_factory.mktemp("shipped") / "artifact")


def test_it_is_small_and_has_no_pickle() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_the_default_export_is_far_inside_the_quality_bounds(report: ExportReport) -> None:
    assert [rung.ok for rung in report.rungs] == [True] * 6
    assert report.quality is not None
    assert report.quality.perplexity_increase <= 0.02
    assert report.quality.mean_kl <= 0.02


def test_it_has_learned_english(report: ExportReport) -> None:
    """On prose it was not trained on; an untrained network has about 8192."""
    assert report.quality is not None
    assert report.quality.checkpoint_perplexity <= 150


def test_the_card_tells_what_the_training_record_says() -> None:
    record = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))
    assert f"{record['tokens_seen']:,}" in CARD
    assert f"{record['parameters']:,}" in CARD


def test_the_card_has_what_a_card_needs() -> None:
    headings = re.findall(r"^## (.+)$", CARD, flags=re.MULTILINE)
    assert headings == ["Use", "Training", "Figures", "Samples", "Limits", "Data and licences"]
