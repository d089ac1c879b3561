"""Artifacts written by earlier releases: every later version reads them and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_memllm import Model, Sampling, load
from edge_memllm.feeding import Feeder

GOLDEN = Path(__file__).parent / "golden"
PROMPT = [72, 101, 108, 108, 111]
# Integer kernels round differently from one processor to the next; float32 ones much less.
LOGIT_BOUNDS = {"fp32": 1e-4, "int8": 5e-2}


def logits_after(model: Model) -> np.ndarray:
    """Logits [V] after the prompt."""
    with Feeder(model.runtime, model.table, 1, 16) as feeder:
        return np.array(feeder.prefill(0, PROMPT))


def continuation(model: Model) -> list[int]:
    """Twelve greedy tokens after the prompt."""
    greedy = Sampling(temperature=0.0)
    pieces = model.stream(PROMPT, max_new_tokens=12, sampling=greedy, ignore_eos=True)
    return [piece.token for piece in pieces]


def golden_artifacts() -> list[Path]:
    return sorted(path for path in GOLDEN.glob("v*/*") if path.is_dir())


@pytest.mark.parametrize("path", golden_artifacts(), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_artifact(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    logits = np.load(path.with_suffix(".npy"), allow_pickle=False)
    assert expected["prompt"] == PROMPT
    with load(path) as model:
        bound = LOGIT_BOUNDS[model.manifest.graph.weights]
        np.testing.assert_allclose(logits_after(model), logits, rtol=0, atol=bound)
        if model.manifest.graph.weights == "fp32":
            assert continuation(model) == expected["tokens"]


def test_the_first_format_has_its_artifacts() -> None:
    assert [path.name for path in golden_artifacts()] == ["fp32-f16", "int8-int4"]
