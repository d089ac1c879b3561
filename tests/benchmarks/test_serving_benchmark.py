"""The benchmark of the engine works, on a tiny artifact; what it measures is not judged here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support import ROOT
from support.checkpoints import MakeArtifact

SCRIPT = ROOT / "benchmarks" / "serving.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serving_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_clients_are_counted_and_compared(
    benchmark: ModuleType,
    make_artifact: MakeArtifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--clients", "3", "--rounds", "2", "--requests", "2", "--prompt-tokens", "5"]
    options += ["--new-tokens", "6", "--threads", "1", "--json", str(tmp_path / "report.json")]
    assert benchmark.main([str(make_artifact()), *options]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["clients"] for row in report["clients"]] == [1, 3]
    alone, together = report["clients"]
    assert alone["against_one"]["ratio"] == 1
    assert alone["texts_per_step"] == 1
    assert 1 <= together["texts_per_step"] <= 3
    assert together["gap_seconds"]["median"] <= together["gap_seconds"]["worst"]
    # Each text grows five times behind its first token; the round before the first is left out.
    assert sum(row["texts"] * row["steps"] for row in report["steps"]) == 2 * (1 + 3) * 2 * 5
    assert "| 3 |" in capsys.readouterr().out
