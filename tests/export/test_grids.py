"""Grids with zero points: their codes, their error, and what ONNX Runtime makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm_export.weights.grids import BlockGrid, searched_grid, split_codes, split_zero
from edge_memllm_export.weights.quantizer import quantize
from support.matrices import dequantize

FLOAT16 = np.dtype("float16")


def rounded(weight: np.ndarray, grid: BlockGrid) -> np.ndarray:
    return grid.weights(grid.nearest(weight))


def plain_grid(weight: np.ndarray, bits: int, block: int) -> BlockGrid:
    """From the least weight of each block, or zero, to the greatest."""
    blocks = weight.reshape(len(weight), -1, block)
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    scales = ((high - low) / (2**bits - 1)).astype(FLOAT16).astype(np.float32)
    scales[scales == 0] = 1
    return BlockGrid(bits, scales, np.rint(-low / scales).astype(np.uint8))


@given(
    st.integers(0, 2**32),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64]),
    st.floats(-8, 8),
    st.floats(1e-4, 1e3),
)
def test_codes_are_in_range_and_scales_are_stored_exactly(
    seed: int, bits: int, block: int, shift: float, size: float
) -> None:
    random = np.random.default_rng(seed)
    weight = ((random.standard_normal((3, 2 * block)) + shift) * size).astype(np.float32)
    weight[0, :block] = 0
    grid = searched_grid(weight, bits, block, FLOAT16)
    np.testing.assert_array_equal(grid.scales, grid.scales.astype(FLOAT16))
    assert grid.zeros.max() < 2**bits
    assert grid.nearest(weight).max() < 2**bits
    assert (rounded(weight, grid)[0, :block] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_on_a_grid_is_found_again(bits: int, random: np.random.Generator) -> None:
    codes = random.integers(0, 2**bits, (8, 128)).astype(np.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    zeros = random.integers(1, 2**bits - 1, (8, 4)).astype(np.uint8)
    scales = (random.uniform(0.5, 2, (8, 4)) / 64).astype(FLOAT16).astype(np.float32)
    weight = BlockGrid(bits, scales, zeros).weights(codes)
    found = searched_grid(weight, bits, 32, FLOAT16)
    np.testing.assert_allclose(rounded(weight, found), weight, rtol=1e-3, atol=1e-3 * scales.max())


def test_the_search_beats_the_extremes_and_grids_without_zero_points(
    random: np.random.Generator,
) -> None:
    weight = (random.standard_normal((64, 256)) + 0.3).astype(np.float32)
    found = np.square(rounded(weight, searched_grid(weight, 4, 32, FLOAT16)) - weight).mean()
    plain = np.square(rounded(weight, plain_grid(weight, 4, 32)) - weight).mean()
    symmetric = dequantize(*quantize(weight, 4, 32, FLOAT16, "w"), 4, 256)
    assert found < 0.95 * plain
    assert found < 0.9 * np.square(symmetric - weight).mean()


def test_what_columns_are_fed_decides_the_grid(random: np.random.Generator) -> None:
    weight = random.standard_normal((64, 128)).astype(np.float32)
    power = np.exp(2 * random.standard_normal(128)).astype(np.float32)

    def error(grid: BlockGrid) -> float:
        return float((np.square(rounded(weight, grid) - weight) * power).mean())

    weighted = searched_grid(weight, 4, 32, FLOAT16, power)
    assert error(weighted) < 0.8 * error(searched_grid(weight, 4, 32, FLOAT16))


def test_a_column_without_inputs_keeps_finite_weights(random: np.random.Generator) -> None:
    weight = random.standard_normal((4, 64)).astype(np.float32)
    power = np.zeros(64, np.float32)
    power[40:] = 1
    grid = searched_grid(weight, 4, 32, FLOAT16, power)
    assert np.abs(rounded(weight, grid) - weight).max() < 1


def test_a_weight_beyond_the_scales_shows(random: np.random.Generator) -> None:
    weight = random.standard_normal((2, 64)).astype(np.float32)
    weight[1, 3] = 1e9
    grid = searched_grid(weight, 4, 32, FLOAT16)
    assert np.isinf(grid.scales[1, 0])
    assert np.isfinite(grid.scales[0]).all()


def test_six_bits_are_four_and_two(random: np.random.Generator) -> None:
    weight = random.standard_normal((16, 128)).astype(np.float32)
    grid = searched_grid(weight, 6, 64, FLOAT16, zero=split_zero(6, 2))
    assert (grid.zeros == split_zero(6, 2)).all()
    codes = grid.nearest(weight)
    high, low = split_codes(codes, 2)
    coarse = BlockGrid(4, 4 * grid.scales, np.full_like(grid.zeros, 8)).weights(high)
    fine = BlockGrid(2, grid.scales, np.full_like(grid.zeros, 2)).weights(low)
    np.testing.assert_allclose(coarse + fine, grid.weights(codes), rtol=1e-6, atol=1e-6)
    error = np.square(grid.weights(codes) - weight).mean()
    four = searched_grid(weight, 4, 64, FLOAT16, zero=8)
    assert error < np.square(rounded(weight, four) - weight).mean() / 10


def test_one_zero_point_for_all_is_as_good_as_scales_without(random: np.random.Generator) -> None:
    weight = random.standard_normal((64, 128)).astype(np.float32)
    found = rounded(weight, searched_grid(weight, 4, 32, FLOAT16, zero=8))
    symmetric = dequantize(*quantize(weight, 4, 32, FLOAT16, "w"), 4, 128)
    assert np.square(found - weight).mean() <= np.square(symmetric - weight).mean() * 1.02
