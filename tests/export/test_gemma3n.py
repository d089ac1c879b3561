"""Gemma 3n, its text: what it has beside what it shares with Gemma 4 (test_per_layer_inputs.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_memllm.errors import ExportError
from edge_memllm_export import export_model
from support.checkpoints import change_config, write_dense
from support.networks import judged, logits_of

KIND = "gemma3n_text"


def change_weights(
    checkpoint: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Change the weights whose names have this part."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    changed = {name: change(each).contiguous() for name, each in tensors.items() if part in name}
    assert changed
    save_file(tensors | changed, file, {"format": "pt"})


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_streams_beyond_float16_are_no_matter(weights: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    for norm in ("post_feedforward_layernorm", "post_laurel_norm"):
        change_weights(checkpoint, norm, lambda each: each * 5e3)  # held, but not a sum of such
    report = export_model(
        checkpoint,
        tmp_path / "out",
        graph_weights=weights,
        accept_quality_loss=True,
    )
    assert report.quality is not None
    assert report.quality.mean_kl < {"fp16": 0.01, "int8": 0.05}[weights]


def test_projections_of_nearly_nothing_stay_so(tmp_path: Path) -> None:
    """Where a stream is made of less than the floor, it is not as long as the embedding."""
    checkpoint = write_dense(tmp_path / "dense", KIND)
    change_weights(checkpoint, "altup_projections.1", lambda each: each * 1e-3)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    expected = logits_of(checkpoint, ids)
    export_model(
        checkpoint,
        tmp_path / "out",
        graph_weights="fp32",
        table_codec="f32",
        accept_quality_loss=True,
    )
    with judged(tmp_path / "out", checkpoint) as artifact:
        found = next(artifact.graph_logits(ids, len(ids)))
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"altup_num_inputs": 1}, "altup_num_inputs is 1, expected at least 2 streams"),
        ({"altup_active_idx": 4}, "altup_active_idx is 4, expected one of 4 streams"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input is 0"),
        (
            {"activation_sparsity_pattern": [0.0, 1.0, *[0.0] * 5]},
            "activation_sparsity_pattern is 1.0 in layer 1, expected a part",
        ),
        ({"intermediate_size": [120]}, "intermediate_size must have an explicit"),
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
