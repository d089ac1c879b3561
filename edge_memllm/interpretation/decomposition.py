"""The logits of a text taken apart: what each part of the network added to them, exactly.

The stream before the final norm is the sum of what the embedding and every block put into it. With
the norm's factor 1 / rms taken as it was, a logit is linear in that sum, so that it is the sum of
the parts' own shares. They say what each part put in, not what would be without it: what is put in
early also changes what later layers do, which `sentences` measures.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_memllm.interpretation.findings import DirectParts, Floats
from edge_memllm.interpretation.network_memory import NetworkMemory

Ids = NDArray[np.int64]


def direct_parts(memory: NetworkMemory, ids: Ids, targets: Ids) -> DirectParts:
    """Take apart the logits of targets [T] in the positions of a text of ids [T]."""
    stream, parts = _streams(memory, ids)
    scale = 1 / np.sqrt(np.mean(stream**2, axis=-1) + memory.network.config.rms_norm_eps)  # [T]
    directions = memory.head.directions(targets) * scale[:, None]  # [T, D]

    def shares(vectors: Floats) -> Floats:
        """[..., T, D] -> [..., T]."""
        found: Floats = np.einsum("...td,td->...t", vectors, directions)
        return found

    return DirectParts(
        logit=shares(stream),
        mean_logit=stream @ memory.head.mean_direction() * scale,
        embedding=shares(parts["embedding"]),
        attention=shares(parts["attention"]).T,
        compute=shares(parts["compute"]).T,
        memory=shares(parts["memory"]).T,
    )


def _streams(memory: NetworkMemory, ids: Ids) -> tuple[Floats, dict[str, Floats]]:
    """The stream [T, D] before the final norm, and its parts, [T, D] or [L, T, D], in float64."""
    model = memory.network.model
    found: dict[str, list[Floats]] = {"attention": [], "compute": []}
    streams: list[Floats] = []
    with ExitStack() as hooks, torch.inference_mode():
        for layer in model.layers:
            _record(hooks, layer.self_attn, lambda out: found["attention"].append(out[0]))
            if hasattr(layer, "mlp"):
                _record(hooks, layer.mlp, lambda out: found["compute"].append(out))
        handle = model.norm.register_forward_pre_hook(lambda _, fed: streams.append(fed[0]))
        hooks.callback(handle.remove)
        memory.network.model(torch.from_numpy(ids).unsqueeze(0), use_cache=False)
    embedding, rows = memory.embeddings(ids), memory.all_rows(ids)  # [T, D], [T, M, D]
    attention = np.stack([_values(each) for each in found["attention"]])
    compute = [_values(each) for each in found["compute"]]
    parts = {
        "embedding": embedding.astype(np.float64),
        "attention": attention,
        "compute": np.stack(compute) if compute else np.zeros_like(attention),
        "memory": _added(rows, memory.gain),
    }
    return _values(streams[0]), parts


def _record(hooks: ExitStack, module: Any, take: Any) -> None:
    handle = module.register_forward_hook(lambda _, fed, out: take(out))
    hooks.callback(handle.remove)


def _values(tensor: torch.Tensor) -> Floats:
    """[1, T, D] of any dtype -> float64 [T, D]."""
    values: Floats = tensor[0].double().numpy()
    return values


def _added(rows: NDArray[np.float32], gain: NDArray[np.float32]) -> Floats:
    """What each layer's memory adds to the stream: rows [T, M, D] -> [L, T, D]."""
    tokens, memories, width = rows.shape
    if not memories:
        return np.zeros((len(gain), tokens, width))
    each = np.broadcast_to(rows, (tokens, len(gain), width)).astype(np.float64)
    added: Floats = (each * gain[:, None]).swapaxes(0, 1)
    return added
