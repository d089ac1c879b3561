"""Attention of a layer, with the operator that keeps keys and values.

x [B,T,D] -- qkv_proj [-- + bias] --> GroupQueryAttention --> o_proj --> [B,T,D]
                               |  past.key/value [B,Hk,C,d]  (in, and out as present;
                               |                   R for C where only a window is kept)
                               |  seqlens_k, total_sequence_length
                               |  cos_cache, sin_cache [P,d/2]

With norms, the packed projection is split and query, key and value are normed head by head. A layer
that reads another's keys and values gives none of its own, [B,0,Hk*d], and that layer's present as
past; one whose values are its keys has no projection for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.step import KVScales, StepInputs, wanted_positions

# GroupQueryAttention takes no other head widths when it applies the rotary embedding itself.
_HEAD_MULTIPLE = 16
_PACKED = ("q_proj", "k_proj", "v_proj")
_NORMS = ("q_norm", "k_norm", "v_norm")
_INT8_CACHE = {
    "kv_cache_bit_width": 8,
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
}


@dataclass(frozen=True)
class AttentionShape:
    """Heads of the network, and how wide a head is in the graph."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # positions looked at, the token's own among them; None: all
    squared_scale: float | None = None  # scores are divided by its root; None: by head_dim's

    @property
    def graph_head_dim(self) -> int:
        """``head_dim`` rounded up to what the operator takes; the extra numbers are zero."""
        return -(-self.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


@dataclass(frozen=True)
class Rotary:
    """cos and sin of every position, float32 [P, head_dim/2]."""

    cosine: np.ndarray
    sine: np.ndarray


@dataclass(frozen=True)
class AttentionWeights:
    """Arrays of one layer, as in the network. Biases and norms are None where it has none."""

    # q_proj, k_proj, v_proj [N, D] and o_proj [D, N]. Without v_proj the keys are the values too;
    # without both they are another layer's.
    projections: Mapping[str, np.ndarray]
    biases: Mapping[str, np.ndarray] | None = None  # of q_proj, k_proj, v_proj [N]
    norms: Mapping[str, np.ndarray] | None = None  # q_norm, k_norm and maybe v_norm [head_dim]
    epsilon: float = 0.0  # of the norms


def widen_heads(weight: np.ndarray, shape: AttentionShape) -> np.ndarray:
    """Rows ``[heads * head_dim, K]`` with zero rows added to reach the graph's head width.

    The rotation pairs row i with row i + d/2, so each half of a head is widened by itself.
    """
    if shape.graph_head_dim == shape.head_dim:
        return weight
    K = weight.shape[1]
    halves = weight.reshape(-1, 2, shape.head_dim // 2, K)
    wide = np.zeros((len(halves), 2, shape.graph_head_dim // 2, K), weight.dtype)
    wide[:, :, : shape.head_dim // 2] = halves
    return wide.reshape(-1, K)


class Attention:
    """The attention of all layers that have one shape and one rotary embedding."""

    def __init__(
        self,
        graph: GraphBuilder,
        step: StepInputs,
        shape: AttentionShape,
        rotary: Rotary,
        kind: str = "",
    ) -> None:
        """Record the rotary caches, widened with the identity rotation; ``kind`` names them."""
        self._graph = graph
        self._step = step
        self._shape = shape
        extra = ((0, 0), (0, (shape.graph_head_dim - shape.head_dim) // 2))
        # Keys and values in float32 are attended to in it. A CPU converts others, those of all
        # positions, in every step and for every head that reads them.
        self._dtype = dtype = "float32" if step.kv_dtype == "float32" else graph.compute_dtype
        cosine = np.pad(rotary.cosine, extra, constant_values=1)
        self._rotary = (
            graph.vector(f"{kind}cos_cache", cosine, dtype),
            graph.vector(f"{kind}sin_cache", np.pad(rotary.sine, extra), dtype),
        )

    def __call__(
        self,
        layer: int,
        path: str,
        x: ir.Value,
        weights: AttentionWeights,
        source: int | None = None,
        *,
        wanted: bool = False,
    ) -> ir.Value:
        """The output [B,T,D]; keys and values of the layer go to the step's `present`.

        Those of the layer ``source`` are read where the layer has none of its own. With ``wanted``
        the output is that of the wanted positions, [B,K,D].
        """
        graph, step, shape = self._graph, self._step, self._shape
        own, quantised = source is None, step.kv_scales is not None
        queries = self._queries(path, x, weights)
        past = step.past[layer] if source is None else step.present[source]
        lengths = [step.seqlens_k, step.total_sequence_length]
        inputs = [*queries, *past, *lengths, *self._rotary]
        if step.kv_scales is not None:
            scales = step.kv_scales[layer if source is None else source]
            inputs += [None, None, None, *self._scale_inputs(path, scales)]
        name = f"{path}/GroupQueryAttention"
        # With int8 the operator wants to write what another layer has written already.
        writes = own or quantised
        present = [f"present.{layer}.key", f"present.{layer}.value"] if writes else []
        attended, *stored = graph.op_outputs(
            name,
            "GroupQueryAttention",
            inputs,
            [f"{name}/output_0", *present],
            self._attributes(rolling=own and layer in step.rolling),
            dtypes=[self._dtype, *[step.kv_dtype] * len(present)],
        )
        if writes:
            step.present[layer] = stored[0], stored[1]
        if wanted:
            (attended,) = wanted_positions(graph, step, attended=attended)
        attended = graph.cast(f"{path}/o_proj", attended, graph.compute_dtype)
        output = widen_heads(weights.projections["o_proj"].T, shape).T
        return graph.linear(f"{path}/o_proj", attended, output)

    def _attributes(self, *, rolling: bool) -> dict[str, Any]:
        shape = self._shape
        attributes: dict[str, Any] = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "do_rotary": 1,
            "scale": (shape.squared_scale or shape.head_dim) ** -0.5,
        }
        if shape.window is not None:
            attributes["local_window_size"] = shape.window
        if rolling:
            attributes["sliding_window_cache"] = 1
        return attributes if self._step.kv_scales is None else attributes | _INT8_CACHE

    def _queries(self, path: str, x: ir.Value, weights: AttentionWeights) -> list[ir.Value | None]:
        """Query, key and value as the operator takes them: packed, or normed and apart."""
        names = [name for name in _PACKED if name in weights.projections]
        packed = self._packed_projection(path, x, weights, names)
        packed = self._graph.cast(f"{path}/qkv_proj", packed, self._dtype)
        if weights.norms is None:
            return [packed, None, None]
        parts = self._apart(path, packed, names)
        normed: list[ir.Value | None] = [
            part if norm not in weights.norms else self._normed(path, norm, part, weights)
            for norm, part in zip(_NORMS, parts, strict=False)
        ]
        if len(parts) == 1:
            normed += [self._no_keys(path, normed[0])] * 2
        return normed

    def _packed_projection(
        self, path: str, x: ir.Value, weights: AttentionWeights, names: Sequence[str]
    ) -> ir.Value:
        """Query, key and value side by side: [B, T, (H + 2 Hk) * d], those of them there are."""
        graph, shape = self._graph, self._shape
        rows = [widen_heads(weights.projections[name], shape) for name in names]
        kind = "qkv_proj" if len(rows) > 1 else names[0]
        packed = graph.linear(f"{path}/{kind}", x, np.concatenate(rows))
        if weights.biases is None:
            return packed
        parts = [widen_heads(weights.biases[name][:, None], shape)[:, 0] for name in names]
        bias = graph.vector(f"{path[1:].replace('/', '.')}.{kind}.bias", np.concatenate(parts))
        return graph.op(f"{path}/{kind}/Add", "Add", [packed, bias])

    def _apart(self, path: str, packed: ir.Value, names: Sequence[str]) -> list[ir.Value]:
        """Query, key and value [B, T, heads * d]; the query alone where it is all there is."""
        if len(names) == 1:
            return [packed]
        graph, shape = self._graph, self._shape
        heads = [shape.heads, *[shape.kv_heads] * (len(names) - 1)]
        sizes = np.array(heads) * shape.graph_head_dim
        parts = graph.op_outputs(
            f"{path}/Split",
            "Split",
            [packed, graph.constant(f"{path[1:].replace('/', '.')}.parts", sizes)],
            [f"{path}/{part}" for part in ("query", "key", "value")[: len(names)]],
            {"axis": -1},
            domain="",
            dtypes=[self._dtype] * len(names),
        )
        return parts if len(parts) == 3 else [*parts, parts[1]]

    def _normed(self, path: str, norm: str, x: ir.Value, weights: AttentionWeights) -> ir.Value:
        """``x`` [B, T, heads * d] normed head by head."""
        assert weights.norms is not None
        graph, shape = self._graph, self._shape
        width = shape.graph_head_dim
        heads = shape.heads if norm == "q_norm" else shape.kv_heads
        name = f"{path[1:].replace('/', '.')}.{norm}"
        apart = graph.constant(f"{name}.heads", np.array([0, 0, heads, width]))
        flat = graph.constant(f"{name}.flat", np.array([0, 0, heads * width]))
        x = graph.op(f"{path}/{norm}/Heads", "Reshape", [x, apart], dtype=self._dtype)
        # Zeros that widen a head leave its squares' sum as it is, and change their mean.
        scale = widen_heads(weights.norms[norm][:, None], shape)[:, 0]
        filled = shape.head_dim / width
        out = graph.norm(f"{path}/{norm}", x, scale, weights.epsilon, filled)
        return graph.op(f"{path}/{norm}/Flat", "Reshape", [out, flat], dtype=self._dtype)

    def _no_keys(self, path: str, query: ir.Value | None) -> ir.Value:
        """Keys, or values, of no position: [B, 0, Hk * d], cut from the query."""
        graph, shape = self._graph, self._shape
        name = f"{path[1:].replace('/', '.')}.no_keys"
        ends = np.array([0, shape.kv_heads * shape.graph_head_dim])
        numbers = {"starts": np.array([0, 0]), "ends": ends, "axes": np.array([1, 2])}
        inputs = [graph.constant(f"{name}.{part}", each) for part, each in numbers.items()]
        cut = [query, *inputs]
        return graph.op(f"{path}/no_keys/Slice", "Slice", cut, dtype=self._dtype)

    def _scale_inputs(self, path: str, scales: KVScales) -> list[ir.Value]:
        """Scales of keys and values as initialisers [Hk * d]; those of padding do not matter."""
        name = path[1:].replace("/", ".")
        return [
            self._graph.constant(f"{name}.{part}_scale", self._widen_scales(each).reshape(-1))
            for part, each in (("key", scales.key), ("value", scales.value))
        ]

    def _widen_scales(self, scales: np.ndarray) -> np.ndarray:
        """[Hk, head_dim] -> [Hk, d], in the places that `widen_heads` gives a head's numbers."""
        shape = self._shape
        half = scales.reshape(-1, 2, shape.head_dim // 2).astype(np.float32)
        extra = (shape.graph_head_dim - shape.head_dim) // 2
        return np.pad(half, ((0, 0), (0, 0), (0, extra)), constant_values=1)
