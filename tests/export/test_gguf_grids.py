"""Every block type whose grid is kept gives what the gguf library dequantises, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from edge_memllm_export.sources.gguf_grids import has_grid, read_grid

# Where the float16 numbers of a block begin, and what codes it may have.
HALVES = {
    "Q4_0": ((0,), (-8, 7)),
    "Q4_1": ((0, 2), (0, 15)),
    "Q5_0": ((0,), (-16, 15)),
    "Q5_1": ((0, 2), (0, 31)),
    "Q8_0": ((0,), (-128, 127)),
    "Q4_K": ((0, 2), (0, 15)),
    "Q5_K": ((0, 2), (0, 31)),
    "Q6_K": ((208,), (-32, 31)),
}
EXTREMES = (0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 1.0, -0.33)


def blocks(name: str, count: int) -> tuple[GGMLQuantizationType, np.ndarray]:
    """Random bytes with finite numbers: ordinary ones, then each pair of extremes."""
    kind = GGMLQuantizationType[name]
    rng = np.random.default_rng(len(name) + ord(name[1]))
    stored = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    pairs = [(a, b) for a in EXTREMES for b in EXTREMES]
    pairs += [tuple(pair) for pair in rng.normal(0, 0.1, (count - len(pairs), 2))]
    for at, numbers in zip(HALVES[name][0], np.array(pairs, np.float16).T, strict=False):
        stored[:, at : at + 2] = numbers[:, None].copy().view(np.uint8)
    return kind, stored


@pytest.mark.parametrize("name", HALVES)
def test_the_grid_is_what_the_library_dequantises_bit_for_bit(name: str) -> None:
    kind, stored = blocks(name, 96)
    rows = stored.reshape(12, -1)
    grid = read_grid(rows, kind)
    expected = dequantize(rows, kind)
    assert grid.weights().tobytes() == expected.tobytes()
    low, high = HALVES[name][1]
    assert (low, high) == (grid.codes.min(), grid.codes.max())
    assert grid.codes.shape == expected.shape
    assert grid.scales.shape == (12, expected.shape[1] // grid.block)
    assert (grid.minima is None) == (low < 0)
    assert grid.finite and grid.kind == name and has_grid(kind)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_no_number_is_told(name: str, number: float) -> None:
    kind, stored = blocks(name, 64)
    at = HALVES[name][0][-1]
    stored[3, at : at + 2] = np.array([number], np.float16).view(np.uint8)
    assert not read_grid(stored, kind).finite


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q2_K", "Q3_K", "IQ4_XS", "MXFP4"])
def test_other_types_have_no_grid(name: str) -> None:
    assert not has_grid(GGMLQuantizationType[name])
