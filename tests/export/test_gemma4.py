"""Gemma 4, its text: what it is not exported with, and how much of its context.

What it shares with Gemma 3n is in test_per_layer_inputs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_memllm.errors import ExportError
from edge_memllm_export import export_model, verify_against
from support.checkpoints import change_config, write_dense

KIND = "gemma4_text"
EXACT: dict[str, Any] = {
    "graph_weights": "fp32",
    "table_codec": "f32",
    "accept_quality_loss": True,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected"),
        ({"enable_moe_block": True, "num_experts": 8}, "choose among 8 experts \\(MoE"),
        ({"use_bidirectional_attention": "all"}, "attends to what comes later"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input is 100"),
    ],
    ids=str,
)
def test_what_the_graph_does_not_compute_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    change_config(checkpoint, **fields)
    with pytest.raises(ExportError, match=message) as refused:
        export_model(checkpoint, tmp_path / "out")
    assert str(checkpoint / "config.json") in str(refused.value)


def test_a_context_can_be_cut(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    whole = export_model(checkpoint, tmp_path / "whole", **EXACT)
    cut = export_model(checkpoint, tmp_path / "cut", context=64, **EXACT)
    sizes = [each.manifest.files["graph.onnx"].bytes for each in (whole, cut)]
    assert cut.manifest.model.max_position_embeddings == 64
    assert cut.manifest.model.identity == whole.manifest.model.identity
    assert sizes[0] - sizes[1] == pytest.approx(64 * (16 + 32) * 4, rel=0.01)
    assert verify_against(tmp_path / "cut", checkpoint)[3].ok
    with pytest.raises(ExportError, match=r"context 129: .* is for 128 positions"):
        export_model(checkpoint, tmp_path / "more", context=129, **EXACT)


def test_tables_of_angles_cut_a_long_context_by_default(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, max_position_embeddings=1 << 20)
    report = export_model(checkpoint, tmp_path / "out", graph_weights="fp16", verify=False)
    assert report.manifest.model.max_position_embeddings == 1 << 18
    assert "context: 262,144 of the model's 1,048,576 positions" in " ".join(report.notes)
