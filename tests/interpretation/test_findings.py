"""Findings as JSON, and the package that makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from edge_memllm.interpretation.findings import (
    Curve,
    DirectParts,
    Explanation,
    GainGroup,
    GainSweep,
    LayerCurves,
    ModelFacts,
    Scored,
    Sentence,
    Token,
)

FACTS = ModelFacts("m", "checkpoint", "sha256:0", 0, 2, 2, 8, 300, 16, (1.0, 0.5))


def test_an_explanation_is_json() -> None:
    zeros = np.zeros((3, 2))
    sentence = Sentence(
        text="a",
        tokens=(Token(1, "<s>"), Token(2, "a"), Token(3, "</script>")),
        targets=(Token(2, "a"), Token(3, "</script>"), Token(4, "\x00")),
        log_probability=np.log([0.5, 0.25, 0.125]),
        without_layer=zeros - 1,
        without_memory=zeros[:, 0] - 2,
        direct=DirectParts(zeros[:, 0], zeros[:, 0], zeros[:, 0], zeros, zeros, zeros + 1 / 3),
    )
    curves = LayerCurves(
        layers=(0, 1),
        norms=Curve("length", "mean length", (1.0, 2.0), control=(0.0, 0.5)),
        gains=GainSweep((1.0, 0.5), (GainGroup("text", "perplexity", (10.0, 1 / 3)),), "all of it"),
    )
    explanation = Explanation(FACTS, "edge-memllm explain m", sentences=(sentence,), curves=curves)
    found = json.loads(json.dumps(explanation.as_dict(), allow_nan=False))
    assert found["model"]["memory_gain"] == [1.0, 0.5]
    assert found["tokens"] == found["clusters"] == []
    assert found["sentences"][0]["log_probability"] == [-0.6931472, -1.386294, -2.079442]
    assert found["sentences"][0]["targets"][2] == {"id": 4, "text": "\x00"}
    assert found["sentences"][0]["direct"]["memory"][1] == [0.3333333, 0.3333333]
    assert found["curves"]["gains"]["groups"][0]["values"] == [10.0, 0.3333333]
    assert found["curves"]["clustering"] is None
    np.testing.assert_allclose(sentence.memory_effect, sentence.log_probability + 2)
    np.testing.assert_allclose(sentence.layer_effect[0], np.log(0.5) + 1)


def test_findings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Scored(Token(0, "a"), 1.0).value = 2.0  # type: ignore[misc]


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, edge_memllm.interpretation.report, edge_memllm.interpretation\n"
        "print({'torch', 'transformers', 'onnxruntime', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
