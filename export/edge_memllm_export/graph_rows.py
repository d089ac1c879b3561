"""What the graph is fed of the table: distinct tokens' embeddings and memory, spread by index.

    embedding [U,D] -------------- Gather(token_index) --> x [B,T,D]
    memory_rows [U,L*D] -- *gain -- Gather(token_index) --> [B,T,L*D]      wire f32, f16
    memory_codes [U,.], memory_scales [U,L*D/G] -- *gain --
                        GatherBlockQuantized(token_index) --> [B,T,L*D]    wire q8, q4
    [B,T,L*D] -- Reshape [B,T,L,D] -- Gather(layer) --> M_l [B,T,D]

The gain multiplies rows (or their scales) while they are still one per distinct token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_memllm.codecs import Codec
from edge_memllm_export.graph_tape import CONTRIB, DATA_TYPES, GraphTape

_WIRE_BITS = {"q8": 8, "q4": 4}


@dataclass
class TokenInputs:
    """The graph's token-dependent inputs, in order, and the values made from them."""

    inputs: list[ir.Value]
    embedding: ir.Value  # [B,T,D]
    memory: ir.Value | None  # [B,T,L,D], gain applied; None for the dense model


def token_inputs(
    tape: GraphTape, layers: int, width: int, codec: Codec, embedding_dtype: str
) -> TokenInputs:
    """Declare the inputs and gather them by ``token_index`` [B,T]."""
    index = _input("token_index", "int64", ["B", "T"])
    embedding = _input("embedding", embedding_dtype, ["U", width])
    x = tape.op("/model/embed_tokens/Gather", "Gather", [embedding, index], dtype=embedding_dtype)
    if embedding_dtype != tape.compute_dtype:
        x = _cast(tape, "/model/embed_tokens/Cast", x)
    inputs = [index, embedding]
    if codec.wire == "none":
        return TokenInputs(inputs, x, None)
    gain = _input("memory_gain", tape.compute_dtype, [layers])
    wire, memory = memory_rows(tape, layers, width, codec, gain, index)
    return TokenInputs([*inputs, *wire, gain], x, memory)


def memory_rows(
    tape: GraphTape, layers: int, width: int, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    """The inputs of the codec's wire form, and the memory [B,T,L,D] made from them.

    All nodes are named ``/model/memory/...``, all initialisers ``model.memory...``.
    """
    if codec.wire in _WIRE_BITS:
        wire, rows = _quantised_rows(tape, layers, width, codec, gain, index)
    else:
        wire, rows = _float_rows(tape, layers, width, codec, gain, index)
    shape = tape.constant("model.memory.shape", np.array([0, 0, layers, width]))
    return wire, tape.op("/model/memory/Reshape", "Reshape", [rows, shape])


def layer_memory(tape: GraphTape, memory: ir.Value, layer: int) -> ir.Value:
    """``M_l`` [B,T,D] of one layer, out of [B,T,L,D]."""
    number = tape.constant(f"model.layers.{layer}.memory.layer", np.array(layer))
    return tape.op(f"/model/layers.{layer}/memory/Gather", "Gather", [memory, number], {"axis": 2})


def _float_rows(
    tape: GraphTape, layers: int, width: int, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    stored = {"f32": "float32", "f16": "float16"}[codec.wire]
    rows = _input("memory_rows", stored, ["U", layers * width])
    gained = _gained(tape, rows, stored, gain, layers, width)
    return [rows], tape.op("/model/memory/Gather", "Gather", [gained, index])


def _quantised_rows(
    tape: GraphTape, layers: int, width: int, codec: Codec, gain: ir.Value, index: ir.Value
) -> tuple[list[ir.Value], ir.Value]:
    bits = _WIRE_BITS[codec.wire]
    codes = _input("memory_codes", "uint8", ["U", layers * width * bits // 8])
    assert codec.group is not None  # both quantised wire forms have groups
    groups = width // codec.group
    scales = _input("memory_scales", "float16", ["U", layers * groups])
    gained = _gained(tape, scales, "float16", gain, layers, groups)
    rows = tape.op(
        "/model/memory/GatherBlockQuantized",
        "GatherBlockQuantized",
        [codes, index, gained],
        {"bits": bits, "block_size": codec.group, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB,
    )
    return [codes, scales], rows


def _gained(
    tape: GraphTape, x: ir.Value, stored: str, gain: ir.Value, layers: int, width: int
) -> ir.Value:
    """``x`` [U, L*width] in the compute dtype, each layer's part times its gain."""
    if stored != tape.compute_dtype:
        x = _cast(tape, "/model/memory/Cast", x)
    apart = tape.constant("model.memory.gain.apart", np.array([0, layers, width]))
    column = tape.constant("model.memory.gain.column", np.array([layers, 1]))
    together = tape.constant("model.memory.gain.together", np.array([0, layers * width]))
    x = tape.op("/model/memory/gain/Reshape", "Reshape", [x, apart])
    factor = tape.op("/model/memory/gain/Reshape_1", "Reshape", [gain, column])
    x = tape.op("/model/memory/gain/Mul", "Mul", [x, factor])
    return tape.op("/model/memory/gain/Reshape_2", "Reshape", [x, together])


def _input(name: str, dtype: str, shape: list[str | int]) -> ir.Value:
    return ir.val(name, dtype=DATA_TYPES[dtype], shape=shape)


def _cast(tape: GraphTape, name: str, x: ir.Value) -> ir.Value:
    return tape.op(name, "Cast", [x], {"to": DATA_TYPES[tape.compute_dtype]})
