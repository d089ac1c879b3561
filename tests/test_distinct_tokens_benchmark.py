"""The benchmark of distinct tokens runs and agrees; what it measures is not judged here."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "distinct_tokens.py"


def test_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(600, dtype=np.uint16) % 7)
    out = tmp_path / "figures.json"
    script = runpy.run_path(str(SCRIPT), run_name="distinct_tokens")
    # In this process, for the start of each other one costs seconds.
    monkeypatch.setitem(script["main"].__globals__, "spawn", script["child"])
    options = "--preset micro --beta 3 --batch-sizes 2 --sequence-length 32 --threads 1"
    files = ["--tokens", str(tmp_path / "tokens.npy"), "--out", str(out)]
    arguments = [*options.split(), "--steps", "1", "--rounds", "1", *files]
    monkeypatch.setattr("sys.argv", [SCRIPT.name, *arguments])
    assert script["main"]() == 0
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert (case["positions"], case["distinct_tokens"]) == (64, 7)
    assert case["difference"] < 1e-4
    assert case["speedup"] == case["seconds"]["plain"] / case["seconds"]["distinct"]
    assert "| 3 | 2 | 64 | 7 |" in out.with_suffix(".md").read_text()
