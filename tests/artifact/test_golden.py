"""Artifacts written by earlier releases: every later version reads them and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_memllm import load
from support import GOLDEN
from support.golden import continuation, logits_after
from support.runtimes import in_own_dtype

# Integer kernels round differently from one processor to the next; float32 ones much less.
LOGIT_BOUNDS = {"fp32": 1e-4, "int8": 5e-2}


def golden_artifacts() -> list[Path]:
    return sorted(path for path in GOLDEN.glob("v*/*") if path.is_dir())


@pytest.mark.parametrize("path", golden_artifacts(), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_artifact(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_own_dtype(monkeypatch)  # as they were computed when they were kept
    expected = json.loads(path.with_suffix(".json").read_text())
    logits = np.load(path.with_suffix(".npy"), allow_pickle=False)
    prompt = expected["prompt"]
    with load(path) as model:
        bound = LOGIT_BOUNDS[model.manifest.graph.weights]
        np.testing.assert_allclose(logits_after(model, prompt), logits, rtol=0, atol=bound)
        if model.manifest.graph.weights == "fp32":
            assert continuation(model, prompt) == expected["tokens"]


def test_every_format_has_its_artifacts() -> None:
    assert [f"{path.parent.name}/{path.name}" for path in golden_artifacts()] == [
        "v1/fp32-f16",
        "v1/int8-int4",
        "v2/fp32-int8-g32",
        "v2/fp32-mixed-g32",
        "v2/fp32-nested8-g32",
        "v3/fp32-int8-g32",
        "v3/fp32-mixed-g32",
        "v3/fp32-nested8-g32",
    ]
