"""Matrices of a graph as numbers."""

from __future__ import annotations

import numpy as np

from edge_memllm.arrays import Floats
from edge_memllm_export.weights.stored_matrix import Blocks


def dequantize(codes: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> Floats:
    """The float32 matrix [N, columns] of blocks without zero points."""
    return Blocks(columns, bits, codes, scales).weights()
