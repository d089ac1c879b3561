"""Weights that lie on a grid of few bits are found and kept as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm_export.weights.own_grids import own_grid
from edge_memllm_export.weights.quantizer import quantize
from edge_memllm_export.weights.stored_matrix import Blocks

FLOAT16 = np.dtype(np.float16)
RANGES = {2: (-2, 1), 4: (-8, 7), 8: (-128, 127)}


def weights_on_a_grid(
    random: np.random.Generator, low: int, high: int, rows: int, columns: int, group: int
) -> np.ndarray:
    codes = random.integers(low, high + 1, (rows, columns // group, group))
    codes[..., :2] = low, 1  # so that the bits are known
    steps = random.uniform(0.01, 0.1, (rows, columns // group, 1)).astype(np.float16)
    signs = random.choice([-1, 1], steps.shape)
    return (codes * signs * steps.astype(np.float32)).reshape(rows, columns).astype(np.float32)


@given(
    st.integers(0, 2**32),
    st.sampled_from([(2, -2, 1), (2, -1, 1), (4, -8, 7), (4, -7, 7), (8, -127, 127)]),
    st.integers(1, 40),
    st.sampled_from([(96, 96), (128, 32), (320, 320)]),
    st.sampled_from([32, 64, 128]),
)
def test_a_grid_is_kept_bit_for_bit(
    seed: int,
    codes: tuple[int, int, int],
    rows: int,
    shape: tuple[int, int],
    block: int,
) -> None:
    bits, low, high = codes
    columns, group = shape
    weight = weights_on_a_grid(np.random.default_rng(seed), low, high, rows, columns, group)
    grid = own_grid(weight)
    assert grid is not None
    assert grid.bits == bits
    for stored in (each for each in RANGES if each >= bits):
        assert grid.fits(stored, block) == (group == columns or block == group)
        if grid.fits(stored, block):
            kept = grid.stored(weight, stored, block, FLOAT16)
            assert kept.block == block
            np.testing.assert_array_equal(kept.weights(), weight)
    assert not any(grid.fits(fewer, block) for fewer in RANGES if fewer < bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_to_bfloat16_behind_the_grid_is_taken_off(
    bits: int, random: np.random.Generator
) -> None:
    weight = weights_on_a_grid(random, *RANGES[bits], 20, 256, 256)
    rounded = (weight.view(np.uint32) + np.uint32(0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    assert (rounded != weight).any()
    grid = own_grid(rounded)
    assert grid is not None
    assert grid.bits == bits
    kept = grid.stored(rounded, bits, 128, FLOAT16).weights()
    np.testing.assert_allclose(kept, weight, rtol=2.0**-8)
    np.testing.assert_array_equal(np.sign(kept), np.sign(weight))


def test_trained_weights_have_none(random: np.random.Generator) -> None:
    weight = random.standard_normal((40, 64)).astype(np.float32)
    assert own_grid(weight) is None
    assert own_grid(weight.astype(np.float16)) is None
    on_one = weights_on_a_grid(random, -2, 1, 40, 64, 64)
    on_one[30, 5] *= 1.1  # beyond the rows that are looked at first
    assert own_grid(on_one) is None


def test_weights_of_nothing_are_kept(random: np.random.Generator) -> None:
    weight = weights_on_a_grid(random, -2, 1, 4, 64, 64)
    weight[1] = 0
    grid = own_grid(weight)
    assert grid is not None
    np.testing.assert_array_equal(grid.stored(weight, 2, 32, FLOAT16).weights(), weight)


@given(st.integers(0, 2**32), st.sampled_from([32, 64, 128]))
def test_two_bits_to_nearest_keep_a_grid_of_any_block(seed: int, block: int) -> None:
    """Found or not: what has four values or three is on the grid of the nearest codes."""
    random = np.random.default_rng(seed)
    weight = weights_on_a_grid(random, -2, 1, 5, 256, block)
    codes, scales = quantize(weight, 2, block, FLOAT16, "w")
    np.testing.assert_array_equal(Blocks(256, 2, codes, scales).weights(), weight)
