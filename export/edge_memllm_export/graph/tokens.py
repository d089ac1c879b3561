"""What the graph is fed of the table: distinct tokens' embeddings and memory, spread by index.

    embedding [U,D] -------------- Gather(token_index) --> x [B,T,D]
    memory_rows [U,L*W] -- *gain -- Gather(token_index) --> [B,T,L*W]      wire f32, f16
    memory_codes [U,.], memory_scales [U,L*W/G] -- *gain --
                        GatherBlockQuantized(token_index) --> [B,T,L*W]    wire q8, q4
    [B,T,L*W] -- Reshape [B,T,L,W] -- Gather(layer) --> M_l [B,T,W]

The gain multiplies rows (or their scales) while they are still one per distinct token; but the
one row [B,T,1,W] that all layers may share becomes [B,T,L,W] by it. Rows that are gates stay as
they are: whoever computes with them has the gain act where it matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.codecs import Codec
from edge_memllm_export.graph.builder import CONTRIB, DATA_TYPES, GraphBuilder, graph_input

_WIRE_BITS = {"q8": 8, "q4": 4}


@dataclass
class TokenInputs:
    """The graph's token-dependent inputs, in order, and the values made from them."""

    inputs: list[ir.Value]
    embedding: ir.Value  # [B,T,D]
    memory: ir.Value | None  # [B,T,L,W], gain applied to rows that are added; None without memory
    gain: ir.Value | None = None  # [L]


def token_inputs(
    graph: GraphBuilder, width: int, memory: MemorySpec, codec: Codec, embedding_dtype: str
) -> TokenInputs:
    """Declare the inputs, embeddings of ``width`` first, and gather them by ``token_index``."""
    index = graph_input("token_index", "int64", ["B", "T"])
    embedding = graph_input("embedding", embedding_dtype, ["U", width])
    x = graph.op("/model/embed_tokens/Gather", "Gather", [embedding, index], dtype=embedding_dtype)
    if embedding_dtype != graph.compute_dtype:
        x = _cast(graph, "/model/embed_tokens/Cast", x)
    inputs = [index, embedding]
    if codec.wire == "none":
        return TokenInputs(inputs, x, None)
    gain = graph_input("memory_gain", graph.compute_dtype, [len(memory.gain)])
    wire, rows = memory_rows(graph, memory, codec, gain, index)
    return TokenInputs([*inputs, *wire, gain], x, rows, gain)


def memory_rows(
    graph: GraphBuilder, memory: MemorySpec, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    """The inputs of the codec's wire form, and the memory [B,T,L,W] made from them.

    All nodes are named ``/model/memory/...``, all initialisers ``model.memory...``.
    """
    if codec.wire in _WIRE_BITS:
        wire, rows = _quantised_rows(graph, memory, codec, gain, index)
    else:
        wire, rows = _float_rows(graph, memory, codec, gain, index)
    apart = graph.constant("model.memory.shape", np.array([0, 0, memory.layers, memory.width]))
    rows = graph.op("/model/memory/Reshape", "Reshape", [rows, apart])
    if _shared(memory) and memory.kind != "gate":
        factor = _gain_column(graph, gain, len(memory.gain))
        rows = graph.op("/model/memory/gain/Mul", "Mul", [rows, factor])
    return wire, rows


def layer_memory(
    graph: GraphBuilder, memory: ir.Value, layer: int, dtype: str | None = None
) -> ir.Value:
    """``M_l`` [B,T,W] of one layer, out of [B,T,L,W], which is of the compute dtype or another."""
    number = graph.constant(f"model.layers.{layer}.memory.layer", np.array(layer))
    name, attributes = f"/model/layers.{layer}/memory/Gather", {"axis": 2}
    return graph.op(name, "Gather", [memory, number], attributes, dtype=dtype)


def gained_weights(graph: GraphBuilder, gain: ir.Value, weights: np.ndarray) -> ir.Value:
    """Weights [L, D] of norms that follow rows, each layer's times its gain out of [L]."""
    shape = graph.constant("model.row_norms.column", np.array([len(weights), 1]))
    column = graph.op("/model/row_norms/Reshape", "Reshape", [gain, shape])
    stored = graph.vector("model.row_norms.weight", weights)
    return graph.op("/model/row_norms/Mul", "Mul", [column, stored])


def layer_weights(graph: GraphBuilder, weights: ir.Value, layer: int) -> ir.Value:
    """Those [D] of one layer, out of [L, D]."""
    number = graph.constant(f"model.row_norms.{layer}", np.array(layer))
    return graph.op(f"/model/row_norms/{layer}/Gather", "Gather", [weights, number])


def _float_rows(
    graph: GraphBuilder, memory: MemorySpec, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    stored = {"f32": "float32", "f16": "float16"}[codec.wire]
    rows = graph_input("memory_rows", stored, ["U", memory.layers * memory.width])
    gained = _gained(graph, rows, stored, gain, memory, memory.width)
    return [rows], graph.op("/model/memory/Gather", "Gather", [gained, index])


def _quantised_rows(
    graph: GraphBuilder, memory: MemorySpec, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    bits = _WIRE_BITS[codec.wire]
    codes = graph_input("memory_codes", "uint8", ["U", memory.layers * memory.width * bits // 8])
    assert codec.group is not None  # both quantised wire forms have groups
    groups = memory.width // codec.group
    scales = graph_input("memory_scales", "float16", ["U", memory.layers * groups])
    gained = _gained(graph, scales, "float16", gain, memory, groups)
    rows = graph.op(
        "/model/memory/GatherBlockQuantized",
        "GatherBlockQuantized",
        [codes, index, gained],
        {"bits": bits, "block_size": codec.group, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB,
    )
    return [codes, scales], rows


def _gained(
    graph: GraphBuilder, x: ir.Value, stored: str, gain: ir.Value, memory: MemorySpec, width: int
) -> ir.Value:
    """``x`` [U, L*width] in the compute dtype, each layer's part times its gain.

    A row that layers share stays as it is: each will need it with another gain. So does a gate.
    """
    if stored != graph.compute_dtype:
        x = _cast(graph, "/model/memory/Cast", x)
    if _shared(memory) or memory.kind == "gate":
        return x
    apart = graph.constant("model.memory.gain.apart", np.array([0, len(memory.gain), width]))
    together = graph.constant("model.memory.gain.together", np.array([0, len(memory.gain) * width]))
    x = graph.op("/model/memory/gain/Reshape", "Reshape", [x, apart])
    x = graph.op("/model/memory/gain/Mul", "Mul", [x, _gain_column(graph, gain, len(memory.gain))])
    return graph.op("/model/memory/gain/Reshape_2", "Reshape", [x, together])


def _shared(memory: MemorySpec) -> bool:
    """Whether several layers use the same row."""
    return memory.layers < len(memory.gain)


def _gain_column(graph: GraphBuilder, gain: ir.Value, layers: int) -> ir.Value:
    column = graph.constant("model.memory.gain.column", np.array([layers, 1]))
    return graph.op("/model/memory/gain/Reshape_1", "Reshape", [gain, column])


def _cast(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    return graph.op(name, "Cast", [x], {"to": DATA_TYPES[graph.compute_dtype]})
