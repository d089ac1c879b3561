"""A tiny network whose rows are gates, exactly exported, and what transformers computes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_memllm import Model
from edge_memllm.engine.feeding import Feeder
from edge_memllm.overlays.loaded import Selection
from support.checkpoints import write_dense

LAYERS, WIDTH, VOCABULARY = 7, 64, 300
IDS = np.random.default_rng(5).integers(0, 256, 40).tolist()

Change = Callable[[Any], None]


def write_gates(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of the Gemma 4 family into the folder ``path``."""
    return write_dense(path, "gemma4_text", seed, hidden_size_per_layer_input=WIDTH)


def export_gates(checkpoint: Path, path: Path, **options: Any) -> Path:
    """Export a checkpoint with nothing rounded, and not judged."""
    from edge_memllm_export import export_model

    exact = {"graph_weights": "fp32", "table_codec": "f32", "verify": False}
    export_model(checkpoint, path, **{**exact, **options})
    return path


def network_logits(
    checkpoint: Path,
    ids: Sequence[int],
    change: Change = lambda rows: None,
    factors: Sequence[float] = (1.0,) * LAYERS,
) -> np.ndarray:
    """Logits [T, V] of transformers' network, nothing of ours between.

    `change` is given the rows [T, L, W] to change in place; what layers add of them is multiplied.
    """
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for layer, factor in zip(network.model.layers, factors, strict=True):
        layer.post_per_layer_input_norm.register_forward_hook(
            lambda _, fed, out, by=factor: out * by
        )
    tokens = torch.tensor([list(ids)])
    with torch.inference_mode():
        rows = network.model.get_per_layer_inputs(tokens).clone()
        change(rows[0])
        fed = network.model.embed_tokens(tokens)
        logits: np.ndarray = network(inputs_embeds=fed, per_layer_inputs=rows).logits[0].numpy()
    return logits


def artifact_logits(model: Model, records: Selection, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a loaded model with some overlays over it, or with its memory off."""
    with Feeder(model.runtime, records.source, 1, 64, memory_gain=records.memory_gain) as feeder:
        return np.array(feeder.score(0, ids))
