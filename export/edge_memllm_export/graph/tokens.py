"""What the graph is fed of the table: distinct tokens' embeddings and memory, spread by index.

    embedding [U,D] -------------- Gather(token_index) --> x [B,T,D]
    memory_rows [U,L*D] -- *gain -- Gather(token_index) --> [B,T,L*D]      wire f32, f16
    memory_codes [U,.], memory_scales [U,L*D/G] -- *gain --
                        GatherBlockQuantized(token_index) --> [B,T,L*D]    wire q8, q4
    [B,T,L*D] -- Reshape [B,T,L,D] -- Gather(layer) --> M_l [B,T,D]

The gain multiplies rows (or their scales) while they are still one per distinct token; but the
one row [B,T,1,D] that all layers may share becomes [B,T,L,D] by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_memllm.codecs import Codec
from edge_memllm_export.graph.ops import CONTRIB, DATA_TYPES, GraphTape

_WIRE_BITS = {"q8": 8, "q4": 4}


@dataclass(frozen=True)
class MemoryShape:
    """How many memory rows there are, and how wide."""

    layers: int  # of the network: each has a gain
    stored: int  # rows of a token in the table: one per layer, or one for all
    width: int

    @property
    def shared(self) -> bool:
        """Whether several layers use the same row."""
        return self.stored < self.layers


@dataclass
class TokenInputs:
    """The graph's token-dependent inputs, in order, and the values made from them."""

    inputs: list[ir.Value]
    embedding: ir.Value  # [B,T,D]
    memory: ir.Value | None  # [B,T,L,D], gain applied; None for the dense model


def token_inputs(
    tape: GraphTape, shape: MemoryShape, codec: Codec, embedding_dtype: str
) -> TokenInputs:
    """Declare the inputs and gather them by ``token_index`` [B,T]."""
    index = _input("token_index", "int64", ["B", "T"])
    embedding = _input("embedding", embedding_dtype, ["U", shape.width])
    x = tape.op("/model/embed_tokens/Gather", "Gather", [embedding, index], dtype=embedding_dtype)
    if embedding_dtype != tape.compute_dtype:
        x = _cast(tape, "/model/embed_tokens/Cast", x)
    inputs = [index, embedding]
    if codec.wire == "none":
        return TokenInputs(inputs, x, None)
    gain = _input("memory_gain", tape.compute_dtype, [shape.layers])
    wire, memory = memory_rows(tape, shape, codec, gain, index)
    return TokenInputs([*inputs, *wire, gain], x, memory)


def memory_rows(
    tape: GraphTape, shape: MemoryShape, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    """The inputs of the codec's wire form, and the memory [B,T,L,D] made from them.

    All nodes are named ``/model/memory/...``, all initialisers ``model.memory...``.
    """
    if codec.wire in _WIRE_BITS:
        wire, rows = _quantised_rows(tape, shape, codec, gain, index)
    else:
        wire, rows = _float_rows(tape, shape, codec, gain, index)
    apart = tape.constant("model.memory.shape", np.array([0, 0, shape.stored, shape.width]))
    memory = tape.op("/model/memory/Reshape", "Reshape", [rows, apart])
    if shape.shared:
        factor = _gain_column(tape, gain, shape.layers)
        memory = tape.op("/model/memory/gain/Mul", "Mul", [memory, factor])
    return wire, memory


def layer_memory(tape: GraphTape, memory: ir.Value, layer: int) -> ir.Value:
    """``M_l`` [B,T,D] of one layer, out of [B,T,L,D]."""
    number = tape.constant(f"model.layers.{layer}.memory.layer", np.array(layer))
    return tape.op(f"/model/layers.{layer}/memory/Gather", "Gather", [memory, number], {"axis": 2})


def _float_rows(
    tape: GraphTape, shape: MemoryShape, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    stored = {"f32": "float32", "f16": "float16"}[codec.wire]
    rows = _input("memory_rows", stored, ["U", shape.stored * shape.width])
    gained = _gained(tape, rows, stored, gain, shape, shape.width)
    return [rows], tape.op("/model/memory/Gather", "Gather", [gained, index])


def _quantised_rows(
    tape: GraphTape, shape: MemoryShape, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    bits = _WIRE_BITS[codec.wire]
    codes = _input("memory_codes", "uint8", ["U", shape.stored * shape.width * bits // 8])
    assert codec.group is not None  # both quantised wire forms have groups
    groups = shape.width // codec.group
    scales = _input("memory_scales", "float16", ["U", shape.stored * groups])
    gained = _gained(tape, scales, "float16", gain, shape, groups)
    rows = tape.op(
        "/model/memory/GatherBlockQuantized",
        "GatherBlockQuantized",
        [codes, index, gained],
        {"bits": bits, "block_size": codec.group, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB,
    )
    return [codes, scales], rows


def _gained(
    tape: GraphTape, x: ir.Value, stored: str, gain: ir.Value, shape: MemoryShape, width: int
) -> ir.Value:
    """``x`` [U, L*width] in the compute dtype, each layer's part times its gain.

    A row that layers share stays as it is: each will need it with another gain.
    """
    if stored != tape.compute_dtype:
        x = _cast(tape, "/model/memory/Cast", x)
    if shape.shared:
        return x
    apart = tape.constant("model.memory.gain.apart", np.array([0, shape.layers, width]))
    together = tape.constant("model.memory.gain.together", np.array([0, shape.layers * width]))
    x = tape.op("/model/memory/gain/Reshape", "Reshape", [x, apart])
    x = tape.op("/model/memory/gain/Mul", "Mul", [x, _gain_column(tape, gain, shape.layers)])
    return tape.op("/model/memory/gain/Reshape_2", "Reshape", [x, together])


def _gain_column(tape: GraphTape, gain: ir.Value, layers: int) -> ir.Value:
    column = tape.constant("model.memory.gain.column", np.array([layers, 1]))
    return tape.op("/model/memory/gain/Reshape_1", "Reshape", [gain, column])


def _input(name: str, dtype: str, shape: list[str | int]) -> ir.Value:
    return ir.val(name, dtype=DATA_TYPES[dtype], shape=shape)


def _cast(tape: GraphTape, name: str, x: ir.Value) -> ir.Value:
    return tape.op(name, "Cast", [x], {"to": DATA_TYPES[tape.compute_dtype]})
