"""Attention as other families have it: biases, normed queries and keys, scaled rotary angles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.modeling import MemoryLLMConfig
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import MakeCheckpoint
from support.graphs import GraphSession

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FORMS: list[dict[str, Any]] = [
    {"attention_bias": True},
    {"qk_norm": True, "num_key_value_heads": 2},
    {"qk_norm": True, "attention_bias": True, "head_dim": 12, "num_key_value_heads": 1},
    {"qk_norm": True, "head_dim": 32, "rms_norm_eps": 1e-2},
    {"rope_parameters": LINEAR},
    {"rope_parameters": LLAMA3, "attention_bias": True, "head_dim": 24},
]


@pytest.mark.parametrize("beta", [0, 3, 8])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_fp32_graph_is_the_network(
    form: dict[str, Any],
    beta: int,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    random: np.random.Generator,
) -> None:
    codec = "none" if beta == 8 else "f32"
    graph = GraphSession(make_checkpoint(beta=beta, **form), "fp32", codec, tmp_path)
    tokens = random.integers(0, 300, 24).tolist()
    expected = graph.judged_logits(tokens)
    whole = graph.logits(tokens, len(tokens))
    assert expected.std() > 1
    assert np.abs(whole - expected).max() <= 1e-4
    assert np.abs(graph.logits(tokens, 1) - whole).max() <= 1e-4
    assert np.abs(graph.logits(tokens, 7) - whole).max() <= 1e-4


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantised_export_climbs_the_ladder(
    form: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """GPTQ reads the inputs of these matrices too, and int8 keys are measured behind their norm."""
    report = export_model(
        make_checkpoint(beta=3, **form),
        tmp_path / "artifact",
        kv_dtype="int8",
        accept_quality_loss=True,
    )
    assert [rung.ok for rung in report.rungs] == [True] * 6


def test_identity_tells_attention_forms_apart(make_checkpoint: MakeCheckpoint) -> None:
    """Two of them have the same weights, and compute something else with them."""
    forms = [{}, *FORMS]
    found = {Checkpoint.open(make_checkpoint(beta=3, **form)).identity() for form in forms}
    assert len(found) == len(forms)


def test_the_output_projection_has_no_bias(make_checkpoint: MakeCheckpoint) -> None:
    network = (
        Checkpoint.open(make_checkpoint(beta=0, attention_bias=True))
        .architecture.reference()
        .network
    )
    attention = network.model.layers[0].self_attn
    assert attention.q_proj.bias is not None
    assert attention.o_proj.bias is None


def test_rope_types_that_follow_the_length_are_refused() -> None:
    with pytest.raises(Exception, match="rope_type is 'dynamic'; use one of default, linear"):
        MemoryLLMConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
