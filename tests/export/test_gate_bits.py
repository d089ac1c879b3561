"""Mixed precision of rows that are gates: bits go where the predictions feel them."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file, save_file

from edge_memllm.artifact.folder import Artifact
from edge_memllm.mixed_precision import Target
from edge_memllm_export import requantize
from support.gates import LAYERS, export_gates, write_gates

TEXT = "Bits for the gates of a text that is like those to come, and few for what nothing feels. "
IDLE = 3


def test_gates_that_nothing_comes_through_get_the_fewest_bits(tmp_path: Path) -> None:
    checkpoint = write_gates(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    weights[f"model.layers.{IDLE}.post_per_layer_input_norm.weight"][:] = 0
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    source = export_gates(checkpoint, tmp_path / "whole", table_codec="f16")
    report = requantize(source, tmp_path / "mixed", table_target=Target(bits=4.5), table_text=TEXT)
    assert report.mean_kl < 0.1
    with Artifact.open(tmp_path / "mixed") as artifact:
        classes = artifact.manifest.layout.classes
    for each in classes:
        assert len(each.layers) == LAYERS
        assert each.layers[IDLE].startswith("codebook2-")
    assert any(not layer.startswith("codebook2-") for each in classes for layer in each.layers)
