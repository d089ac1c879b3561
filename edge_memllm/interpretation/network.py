"""A network's memory as numpy: the coefficients, values and rows of FFN-M, layer by layer.

An FFN-M is a key-value memory (paper, section 2.3.1): with q the normed embedding of a token,
keys k_i the rows of up_proj, gates g_i those of gate_proj and values v_i the columns of down_proj,
its output is sum_i c_i v_i with c_i = (q . k_i) SiLU(q . g_i) (eq. 2.7-2.8, SiLU by eq. 2.3). A
memory that all layers share is layer 0. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from edge_memllm.arrays import Doubles, Floats, Ids
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.interpretation.findings import DirectParts
from edge_memllm.interpretation.head import Head
from edge_memllm.modeling import MemoryLLMForCausalLM


class NetworkMemory:
    """The memory of a network on the CPU. M layers of K keys, width D, vocabulary V."""

    def __init__(self, network: MemoryLLMForCausalLM) -> None:
        """Take any network of the family; one without memory has no layers."""
        config = network.config
        self.network = network
        self.layers: int = config.memory_layers
        self.width: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        self.keys: int | None = (
            config.memory_intermediate_size if config.has_memory_network else None
        )

    @cached_property
    def head(self) -> Head:
        """The head and the weight of the final norm."""
        weight, norm = self.network.lm_head.weight, self.network.model.norm.weight

        def rows(ids: Ids) -> Floats:
            return _numpy(weight[torch.from_numpy(ids)])

        return Head(rows, self.vocabulary, _numpy(norm))

    @property
    def gain(self) -> Floats:
        """What each layer multiplies its memory by, [L]."""
        layers = range(self.network.config.num_hidden_layers)
        gains = [float(self.network.model.memory_gain(layer)) for layer in layers]
        return np.array(gains, np.float32)

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [N, D] of tokens [N]."""
        with torch.inference_mode():
            return _numpy(self.network.model.embed_tokens(torch.from_numpy(ids)))

    def coefficients(self, layer: int, ids: Ids, keys: Sequence[int] | None = None) -> Floats:
        """Return c [N, K] of tokens [N] in a layer, or only of the keys that are named.

        Raises `RequestError` where no FFN-M makes the rows, as does `values`.
        """
        network = self._network(layer)
        gates, ups = network.gate_proj.weight, network.up_proj.weight
        if keys is not None:
            gates, ups = gates[list(keys)], ups[list(keys)]
        with torch.inference_mode():
            query = self._query(layer, ids)
            gate, up = (functional.linear(query, each.to(query.dtype)) for each in (gates, ups))
            return _numpy(functional.silu(gate) * up)

    def values(self, layer: int, keys: Sequence[int] | None = None) -> Floats:
        """Return the values [K, D] of a layer, or only of the keys that are named."""
        columns = self._network(layer).down_proj.weight.T
        return _numpy(columns if keys is None else columns[list(keys)])

    def rows(self, layer: int, ids: Ids) -> Floats:
        """Return the rows [N, D] of tokens [N] in a layer, without gain."""
        with torch.inference_mode():
            trained = self._trained_rows(layer, ids)
            if self.keys is None:
                assert trained is not None
                return _numpy(trained)
            computed = self._network(layer)(self._query(layer, ids))
            return _numpy(computed if trained is None else computed + trained)

    def all_rows(self, ids: Ids) -> Floats:
        """Return the rows [N, M, D] of tokens [N] in all layers, without gain."""
        with torch.inference_mode():
            return _numpy(self.network.model.memory_rows(torch.from_numpy(ids)))

    def _network(self, layer: int) -> Any:
        """The FFN-M of a layer."""
        if self.keys is None:
            config = self.network.config
            why = f"memory_source {config.memory_source!r}, beta {config.beta}"
            raise RequestError(
                f"This network has no keys: no FFN-M makes its rows ({why}). Keys and coefficients "
                "need one; rows can be read all the same."
            )
        shared = self.network.model.token_memory.network
        return self.network.model.layers[layer].memory if shared is None else shared

    def _query(self, layer: int, ids: Ids) -> torch.Tensor:
        """q: the embedding [N, D] behind the norm, or norms, in front of a layer's FFN-M."""
        model = self.network.model
        query = model.embed_tokens(torch.from_numpy(ids))
        if model.token_memory.norm is not None:
            query = model.token_memory.norm(query)
        if model.token_memory.network is None:
            query = model.layers[layer].memory_layernorm(query)
        return query

    def _trained_rows(self, layer: int, ids: Ids) -> torch.Tensor | None:
        """The rows [N, D] that are parameters, if there are any."""
        table = self.network.model.token_memory.rows
        if table is None:
            return None
        return table(torch.from_numpy(ids)).unflatten(-1, (-1, self.width))[:, layer]


def _numpy(tensor: torch.Tensor) -> Floats:
    found: Floats = tensor.detach().float().numpy()
    if not np.isfinite(found).all():
        raise ArtifactError(
            "The checkpoint's weights give numbers that are not finite. It is damaged, or its "
            "training went wrong; take an earlier one."
        )
    return found


def direct_parts(memory: NetworkMemory, ids: Ids, targets: Ids) -> DirectParts:
    """Take apart the logits of targets [T] in the positions of a text of ids [T]."""
    stream, parts = _streams(memory, ids)
    scale = 1 / np.sqrt(np.mean(stream**2, axis=-1) + memory.network.config.rms_norm_eps)  # [T]
    directions = memory.head.directions(targets) * scale[:, None]  # [T, D]

    def shares(vectors: Doubles) -> Doubles:
        """[..., T, D] -> [..., T]."""
        found: Doubles = np.einsum("...td,td->...t", vectors, directions)
        return found

    return DirectParts(
        logit=shares(stream),
        mean_logit=stream @ memory.head.mean_direction() * scale,
        embedding=shares(parts["embedding"]),
        attention=shares(parts["attention"]).T,
        compute=shares(parts["compute"]).T,
        memory=shares(parts["memory"]).T,
    )


def _streams(memory: NetworkMemory, ids: Ids) -> tuple[Doubles, dict[str, Doubles]]:
    """The stream [T, D] before the final norm, and its parts, [T, D] or [L, T, D], in float64."""
    model = memory.network.model
    found: dict[str, list[Doubles]] = {"attention": [], "compute": []}
    streams: list[Doubles] = []
    with ExitStack() as hooks, torch.inference_mode():
        for layer in model.layers:
            _record(hooks, layer.self_attn, lambda out: found["attention"].append(out[0]))
            if layer.mlp is not None:
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
        "memory": _added(rows, memory.gain) if memory.layers else np.zeros_like(attention),
    }
    return _values(streams[0]), parts


def _record(hooks: ExitStack, module: Any, take: Any) -> None:
    handle = module.register_forward_hook(lambda _, fed, out: take(out))
    hooks.callback(handle.remove)


def _values(tensor: torch.Tensor) -> Doubles:
    """[1, T, D] of any dtype -> float64 [T, D]."""
    values: Doubles = tensor[0].double().numpy()
    return values


def _added(rows: NDArray[np.float32], gain: NDArray[np.float32]) -> Doubles:
    """What each layer's memory adds to the stream: rows [T, M, D] -> [L, T, D]."""
    tokens, _, width = rows.shape
    each = np.broadcast_to(rows, (tokens, len(gain), width)).astype(np.float64)
    added: Doubles = (each * gain[:, None]).swapaxes(0, 1)
    return added
