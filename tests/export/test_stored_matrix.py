"""Matrices as sums of blocks: what they stand for, and that a graph computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm_export.graph.builder import GraphBuilder, graph_input
from edge_memllm_export.weights.stored_matrix import (
    Blocks,
    BlockSums,
    StoredMatrix,
    packed,
    unpacked,
)

GENERATOR = np.random.default_rng(5)


def blocks(
    rows: int, columns: int, bits: int, block: int, *, zeros: bool = False, scale: float = 0.01
) -> Blocks:
    across = -(-columns // block)
    codes = GENERATOR.integers(0, 2**bits, (rows, across, block), np.uint8)
    points = GENERATOR.integers(0, 2**bits, (rows, across), np.uint8)
    return Blocks(
        columns,
        bits,
        packed(codes, bits),
        (GENERATOR.random((rows, across)) * scale).astype(np.float32),
        packed(points, bits) if zeros else None,
    )


MATRICES = {
    "4 bits": [StoredMatrix((blocks(24, 96, 4, 32),))],
    "zero points": [StoredMatrix((blocks(24, 96, 4, 32, zeros=True),))],
    "odd zero points": [StoredMatrix((blocks(24, 80, 4, 16, zeros=True),))],
    "a last block that is filled up": [StoredMatrix((blocks(24, 72, 4, 64, zeros=True),))],
    "8 bits": [StoredMatrix((blocks(24, 96, 8, 16, zeros=True),))],
    "6 bits": [StoredMatrix((blocks(24, 96, 4, 32), blocks(24, 96, 2, 32, scale=0.002)))],
    "sums": [StoredMatrix((blocks(24, 102, 4, 32),), BlockSums(32, 2))],
    "rows": [
        StoredMatrix((blocks(8, 99, 4, 32),), BlockSums(32, 1)),
        StoredMatrix((blocks(11, 96, 8, 32),)),
        StoredMatrix((blocks(5, 102, 4, 32, zeros=True),), BlockSums(32, 2)),
    ],
}


@pytest.mark.parametrize("stored", MATRICES.values(), ids=MATRICES)
def test_a_graph_computes_what_the_blocks_stand_for(
    stored: list[StoredMatrix], tmp_path: Path
) -> None:
    exact = [replace(each, level=0) for each in stored]
    weight = np.concatenate([each.weights() for each in stored])
    builder = GraphBuilder("float32", lambda name, weight: exact)
    x = graph_input("x", "float32", ["B", "T", weight.shape[1]])
    y = builder.linear("/m", x, weight)
    ir.save(ir.Model(builder.graph([x], [y], 23), ir_version=11), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7):
        fed = GENERATOR.standard_normal((2, count, weight.shape[1])).astype(np.float32)
        (found,) = session.run(None, {"x": fed})
        np.testing.assert_allclose(found, fed @ weight.T, atol=2e-5)


def test_sums_of_the_same_inputs_are_made_once() -> None:
    stored = MATRICES["rows"]
    builder = GraphBuilder("float32", lambda name, weight: stored)
    x = graph_input("x", "float32", ["B", "T", 96])
    for path in ("/one", "/two"):
        builder.linear(path, x, np.concatenate([each.weights() for each in stored]))
    assert [node.op_type for node in builder.recorded()[0]].count("ReduceSum") == 1


@pytest.mark.parametrize("zeros", [False, True])
def test_eight_bits_are_two_of_four_where_inputs_are_not_rounded(zeros: bool) -> None:
    part = blocks(24, 102, 8, 32, zeros=zeros)
    part = replace(part, scales=part.scales.astype(np.float16))
    stored = StoredMatrix((part,), BlockSums(32, 2))
    halves = stored.at_level_0()
    assert [each.bits for each in halves.parts] == [4, 4] and halves.level == 0
    np.testing.assert_allclose(halves.weights(), stored.weights(), rtol=0, atol=1e-6)


@given(
    bits=st.sampled_from([2, 4, 8]),
    codes=st.lists(st.integers(0, 255), min_size=1, max_size=9),
)
def test_codes_come_back_out_of_bytes(bits: int, codes: list[int]) -> None:
    given_codes = np.array(codes, np.uint8) % np.uint8(2 ** (bits - 1)) if bits < 8 else codes
    array = np.array(given_codes, np.uint8)[None]
    stored = packed(array, bits)
    assert stored.shape == (1, -(-len(codes) * bits // 8))
    np.testing.assert_array_equal(unpacked(stored, bits)[:, : len(codes)], array)
