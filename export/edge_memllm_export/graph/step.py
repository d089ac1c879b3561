"""What a step brings to the graph, as values to build on: records, caches, positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edge_memllm.artifact.model_spec import CacheSpec, ModelSpec
from edge_memllm.codecs import Codec
from edge_memllm_export.graph.builder import GraphBuilder, graph_input
from edge_memllm_export.graph.tokens import TokenInputs, token_inputs

KeyValue = tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class KVScales:
    """Steps of int8 keys and values in one layer, float32 [Hk, head_dim]: value = code * step."""

    key: np.ndarray
    value: np.ndarray


@dataclass
class StepInputs:
    """The graph's inputs; `present` fills with its outputs, layer by layer."""

    tokens: TokenInputs
    logits_index: ir.Value  # int64 [B, K]
    seqlens_k: ir.Value  # int32 [B], valid positions of each sequence - 1
    total_sequence_length: ir.Value  # int32 scalar
    past: dict[int, KeyValue]  # [B, Hk, C, d] by layer, R in place of C where they are rolling
    rolling: frozenset[int]  # layers that keep a window only
    kv_dtype: str
    kv_scales: Mapping[int, KVScales] | None  # by layer, where keys and values are int8
    present: dict[int, KeyValue] = field(default_factory=dict)
    positions: ir.Value | None = None  # those that want logits [B, K, 1], once something asked

    @property
    def inputs(self) -> list[ir.Value]:
        """All of them, in the graph's order."""
        positions = [self.logits_index, self.seqlens_k, self.total_sequence_length]
        return [*self.tokens.inputs, *positions, *(v for pair in self.past.values() for v in pair)]

    @property
    def outputs(self) -> list[ir.Value]:
        """Keys and values as the step leaves them."""
        return [value for pair in self.present.values() for value in pair]


def step_inputs(
    graph: GraphBuilder,
    spec: ModelSpec,
    codec: Codec,
    embedding_dtype: str,
    kv_dtype: str,
    kv_scales: Mapping[int, KVScales] | None,
) -> StepInputs:
    """Declare everything that docs/format.md feeds a graph of this model."""
    return StepInputs(
        tokens=token_inputs(graph, spec.hidden_size, spec.memory, codec, embedding_dtype),
        logits_index=graph_input("logits_index", "int64", ["B", "K"]),
        seqlens_k=graph_input("seqlens_k", "int32", ["B"]),
        total_sequence_length=graph_input("total_sequence_length", "int32", []),
        past={cache.layer: _cache_inputs(kv_dtype, cache) for cache in spec.caches},
        rolling=frozenset(cache.layer for cache in spec.caches if cache.rolling),
        kv_dtype=kv_dtype,
        kv_scales=kv_scales,
    )


def _cache_inputs(dtype: str, cache: CacheSpec) -> KeyValue:
    # Windows of several sizes have several capacities; equal names stand for equal sizes.
    rows = f"R{cache.window}" if cache.rolling else "C"
    dims: list[str | int] = ["B", cache.kv_heads, rows, cache.head_dim]
    key, value = (
        graph_input(f"past_key_values.{cache.layer}.{part}", dtype, dims)
        for part in ("key", "value")
    )
    return key, value


def wanted_positions(graph: GraphBuilder, step: StepInputs, **values: ir.Value) -> list[ir.Value]:
    """Values [B,T,...], by their names, at the positions that want logits: [B,K,...]."""
    if step.positions is None:
        axis = graph.constant("model.positions.axis", np.array([-1]))
        step.positions = graph.op(
            "/model/positions/Unsqueeze", "Unsqueeze", [step.logits_index, axis], dtype="int64"
        )
    return [
        graph.op(
            f"/model/positions/{name}/GatherND",
            "GatherND",
            [value, step.positions],
            {"batch_dims": 1},
            dtype=graph.type_of(value),
        )
        for name, value in values.items()
    ]
