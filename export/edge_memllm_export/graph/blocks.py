"""The attention of one layer: packed projection, GroupQueryAttention, output projection.

x [B,T,D] -- qkv_proj [-- + bias] --> GroupQueryAttention --> o_proj --> [B,T,D]
                                       |  past.key/value [B,Hk,C,d]  (in, and out as present)
                                       |  seqlens_k, total_sequence_length
                                       |  cos_cache, sin_cache [P,d/2]

With norms of query and key, the packed projection is split and they are normed head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from edge_memllm_export.graph.ops import GraphTape

# GroupQueryAttention takes no other head widths when it applies the rotary embedding itself.
_HEAD_MULTIPLE = 16
_PACKED = ("q_proj", "k_proj", "v_proj")
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

    @property
    def graph_head_dim(self) -> int:
        """``head_dim`` rounded up to what the operator takes; the extra numbers are zero."""
        return -(-self.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


class AttentionInputs(NamedTuple):
    """What the attention of every layer shares, in the order the operator takes it."""

    seqlens_k: ir.Value  # int32 [B], valid positions of each sequence - 1
    total_sequence_length: ir.Value  # int32 scalar
    cosine: ir.Value  # [P, d/2]
    sine: ir.Value


@dataclass(frozen=True)
class AttentionWeights:
    """Arrays of one layer, as in the network. Biases and norms are None where it has none."""

    projections: Mapping[str, np.ndarray]  # q_proj, k_proj, v_proj [N, D] and o_proj [D, N]
    biases: Mapping[str, np.ndarray] | None = None  # of q_proj, k_proj, v_proj [N]
    norms: Mapping[str, np.ndarray] | None = None  # q_norm, k_norm [head_dim]


@dataclass(frozen=True)
class KVScales:
    """Steps of int8 keys and values in one layer, float32 [Hk, head_dim]: value = code * step."""

    key: np.ndarray
    value: np.ndarray


def rotary_inputs(
    tape: GraphTape, shape: AttentionShape, cosine: np.ndarray, sine: np.ndarray
) -> tuple[ir.Value, ir.Value]:
    """The rotary caches [P, head_dim/2] as initialisers, widened with the identity rotation."""
    extra = ((0, 0), (0, (shape.graph_head_dim - shape.head_dim) // 2))
    return (
        tape.vector("cos_cache", np.pad(cosine, extra, constant_values=1)),
        tape.vector("sin_cache", np.pad(sine, extra)),
    )


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


def attention(
    tape: GraphTape,
    path: str,
    x: ir.Value,
    weights: AttentionWeights,
    shape: AttentionShape,
    shared: AttentionInputs,
    past: tuple[ir.Value, ir.Value],
    present: tuple[str, str],
    kv_scales: KVScales | None = None,
) -> tuple[ir.Value, list[ir.Value]]:
    """The attention output [B,T,D] and the present key and value, named as ``present`` says.

    With ``kv_scales`` the cache holds int8.
    """
    packed = _packed_projection(tape, path, x, weights, shape)
    queries: list[ir.Value | None] = [packed, None, None]
    if weights.norms is not None:
        queries = _normed_heads(tape, path, packed, weights.norms, shape)
    name = f"{path}/GroupQueryAttention"
    inputs: list[ir.Value | None] = [*queries, *past, *shared]
    attributes: dict[str, Any] = {
        "num_heads": shape.heads,
        "kv_num_heads": shape.kv_heads,
        "do_rotary": 1,
        "scale": shape.head_dim**-0.5,
    }
    if kv_scales is not None:
        inputs += [None, None, None, *_scale_inputs(tape, path, kv_scales, shape)]
        attributes |= _INT8_CACHE
    kv_dtype = tape.compute_dtype if kv_scales is None else "int8"
    attended, *caches = tape.op_outputs(
        name,
        "GroupQueryAttention",
        inputs,
        [f"{name}/output_0", *present],
        attributes,
        dtypes=[tape.compute_dtype, kv_dtype, kv_dtype],
    )
    output = widen_heads(weights.projections["o_proj"].T, shape).T
    return tape.linear(f"{path}/o_proj", attended, output), caches


def _packed_projection(
    tape: GraphTape, path: str, x: ir.Value, weights: AttentionWeights, shape: AttentionShape
) -> ir.Value:
    """Query, key and value side by side: [B, T, (H + 2 Hk) * d]."""
    rows = [widen_heads(weights.projections[name], shape) for name in _PACKED]
    packed = tape.linear(f"{path}/qkv_proj", x, np.concatenate(rows))
    if weights.biases is None:
        return packed
    parts = [widen_heads(weights.biases[name][:, None], shape)[:, 0] for name in _PACKED]
    bias = tape.vector(f"{path[1:].replace('/', '.')}.qkv_proj.bias", np.concatenate(parts))
    return tape.op(f"{path}/qkv_proj/Add", "Add", [packed, bias])


def _normed_heads(
    tape: GraphTape,
    path: str,
    packed: ir.Value,
    norms: Mapping[str, np.ndarray],
    shape: AttentionShape,
) -> list[ir.Value | None]:
    """Query, key and value apart, the first two normed over each head."""
    name = path[1:].replace("/", ".")
    width = shape.graph_head_dim
    sizes = np.array([shape.heads, shape.kv_heads, shape.kv_heads]) * width
    query, key, value = tape.op_outputs(
        f"{path}/Split",
        "Split",
        [packed, tape.constant(f"{name}.parts", sizes)],
        [f"{path}/{part}" for part in ("query", "key", "value")],
        {"axis": -1},
        domain="",
    )
    heads = tape.constant(f"{name}.heads", np.array([0, 0, -1, width]))
    flat = tape.constant(f"{name}.flat", np.array([0, 0, -1]))

    def normed(part: str, x: ir.Value) -> ir.Value:
        apart = tape.op(f"{path}/{part}/Heads", "Reshape", [x, heads])
        # Zeros that widen a head leave its squares' sum as it is, and change their mean.
        scale = widen_heads(norms[part][:, None], shape)[:, 0]
        out = tape.norm(f"{path}/{part}", apart, scale, shape.head_dim / width)
        return tape.op(f"{path}/{part}/Flat", "Reshape", [out, flat])

    return [normed("q_norm", query), normed("k_norm", key), value]


def _scale_inputs(
    tape: GraphTape, path: str, scales: KVScales, shape: AttentionShape
) -> list[ir.Value]:
    """Scales of keys and values as initialisers [Hk * d]; those of padding do not matter."""
    name = path[1:].replace("/", ".")
    return [
        tape.constant(
            f"{name}.{part}_scale", _widen_scales(getattr(scales, part), shape).reshape(-1)
        )
        for part in ("key", "value")
    ]


def _widen_scales(scales: np.ndarray, shape: AttentionShape) -> np.ndarray:
    """[Hk, head_dim] -> [Hk, d], in the places that `widen_heads` gives a head's numbers."""
    half = scales.reshape(-1, 2, shape.head_dim // 2).astype(np.float32)
    extra = (shape.graph_head_dim - shape.head_dim) // 2
    return np.pad(half, ((0, 0), (0, 0), (0, extra)), constant_values=1)


def swiglu(tape: GraphTape, path: str, x: ir.Value, weights: dict[str, np.ndarray]) -> ir.Value:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one product; [B,T,D] -> [B,T,D]."""
    width = len(weights["gate_proj"])
    both = np.concatenate([weights["gate_proj"], weights["up_proj"]])
    wide = tape.linear(f"{path}/gate_up_proj", x, both)
    parts = tape.constant(f"{path[1:].replace('/', '.')}.parts", np.array([width, width]))
    gate, up = tape.op_outputs(
        f"{path}/Split",
        "Split",
        [wide, parts],
        [f"{path}/gate", f"{path}/up"],
        {"axis": -1},
        domain="",
    )
    sigmoid = tape.op(f"{path}/act_fn/Sigmoid", "Sigmoid", [gate])
    silu = tape.op(f"{path}/act_fn/Mul", "Mul", [gate, sigmoid])
    product = tape.op(f"{path}/Mul", "Mul", [silu, up])
    return tape.linear(f"{path}/down_proj", product, weights["down_proj"])


def linear_compute(
    tape: GraphTape, path: str, x: ir.Value, projections: list[np.ndarray]
) -> ir.Value:
    """One or two matrices with nothing in between; [B,T,D] -> [B,T,D]."""
    for number, weight in enumerate(projections):
        x = tape.linear(f"{path}/projections.{number}", x, weight)
    return x
