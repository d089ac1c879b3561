"""Matrices of a graph as numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from edge_memllm.arrays import Floats
from edge_memllm_export.weights.stored_matrix import Blocks


def dequantize(codes: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> Floats:
    """The float32 matrix [N, columns] of blocks without zero points."""
    return Blocks(columns, bits, codes, scales).weights()


def matrices_of(artifact: Path) -> dict[str, tuple[int, Floats]]:
    """Bits and values of every MatMulNBits, which have no zero points, by its matrix's path."""
    found = {}
    for node in ir.load(artifact / "graph.onnx").graph:
        if node.op_type == "MatMulNBits":
            codes, scales = (value.const_value.numpy() for value in node.inputs[1:3])
            bits, columns = (node.attributes[name].as_int() for name in ("bits", "K"))
            values = dequantize(codes, scales, bits, columns)
            found[node.name.removesuffix("/MatMulNBits")] = bits, values
    return found
