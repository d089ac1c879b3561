"""Codes chosen by what a matrix is fed, against rounding to nearest and against the paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm_export.weights.gptq import Feedback, damped
from edge_memllm_export.weights.grids import searched_grid
from edge_memllm_export.weights.quantizer import BLOCKS, quantize
from edge_memllm_export.weights.stored_matrix import packed, unpacked
from support.matrices import dequantize

FLOAT16 = np.dtype("float16")


def inputs(random: np.random.Generator, columns: int, rank: int | None = None) -> np.ndarray:
    """Correlated inputs [200, columns], of unlike sizes, as real ones are."""
    mixing = random.standard_normal((rank or columns, columns))
    spread = np.exp(random.standard_normal(columns))
    x = random.standard_normal((200, rank or columns)) @ mixing * spread
    return (x / np.abs(x).max(initial=1e-9)).astype(np.float32)


def moment_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / np.float32(len(x))


def row_errors(weight: np.ndarray, rounded: np.ndarray, moment: np.ndarray) -> np.ndarray:
    missed = (weight - rounded).astype(np.float64)
    return np.einsum("nk,kj,nj->n", missed, damped(moment).astype(np.float64), missed)


def chosen_by(
    choose: Feedback, weight: np.ndarray, bits: int, block: int, scale_dtype: np.dtype = FLOAT16
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales as those of `quantize`, the codes chosen anew."""
    codes, scales = quantize(weight, bits, block, scale_dtype, "w")
    flat = unpacked(codes, bits).reshape(len(codes), -1)
    wide = np.pad(weight, ((0, 0), (0, flat.shape[1] - weight.shape[1])))
    half = 2 ** (bits - 1)
    signed = choose(wide, flat.astype(np.float32) - half, scales.astype(np.float32), bits)
    return packed((signed + half).reshape(*scales.shape, block), bits), scales


def both(
    weight: np.ndarray, moment: np.ndarray, bits: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix with codes chosen and with nearest codes."""
    chosen = chosen_by(Feedback(moment, block), weight, bits, block)
    nearest = quantize(weight, bits, block, FLOAT16, "w")
    np.testing.assert_array_equal(chosen[1], nearest[1])
    assert chosen[0].shape == nearest[0].shape
    columns = weight.shape[1]
    return dequantize(*chosen, bits, columns), dequantize(*nearest, bits, columns)


@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.integers(1, 150),
    st.sampled_from([1, 7, None]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(BLOCKS),
)
def test_no_row_is_worse_than_rounded_to_nearest(
    seed: int, rows: int, columns: int, rank: int | None, bits: int, block: int
) -> None:
    random = np.random.default_rng(seed)
    moment = moment_of(inputs(random, columns, rank))
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    chosen, nearest = both(weight, moment, bits, block)
    least = row_errors(weight, nearest, moment)
    assert (row_errors(weight, chosen, moment) <= least * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize(("bits", "part"), [(2, 0.35), (4, 0.25), (8, 0.25)])
def test_correlated_inputs_leave_a_fraction_of_the_error(
    bits: int, part: float, random: np.random.Generator
) -> None:
    moment = moment_of(inputs(random, 256, 64))
    weight = random.standard_normal((64, 256)).astype(np.float32)
    chosen, nearest = both(weight, moment, bits, 128)
    least = row_errors(weight, nearest, moment).sum()
    assert row_errors(weight, chosen, moment).sum() <= part * least


def test_inputs_that_have_nothing_in_common_change_nothing(random: np.random.Generator) -> None:
    moment = np.diag(random.uniform(0.1, 1, 96).astype(np.float32))
    weight = random.standard_normal((9, 96)).astype(np.float32)
    chosen, nearest = both(weight, moment, 4, 32)
    np.testing.assert_array_equal(chosen, nearest)


def test_codes_are_those_of_the_paper(random: np.random.Generator) -> None:
    """Frantar et al. 2023, algorithm 1, with the inverse it speaks of and scales fixed before."""
    moment = moment_of(inputs(random, 96, 24))
    weight = random.standard_normal((20, 96)).astype(np.float32)
    chosen, _ = both(weight, moment, 4, 32)
    scales = quantize(weight, 4, 32, FLOAT16, "w")[1].astype(np.float64).repeat(32, axis=1)
    wide = damped(moment).astype(np.float64)
    order = np.argsort(-wide.diagonal(), kind="stable")
    inverse = np.linalg.cholesky(np.linalg.inv(wide[order[:, None], order])).T
    left, paper = weight.astype(np.float64)[:, order], np.empty((20, 96))
    for k in range(96):
        step = scales[:, order[k]]
        paper[:, order[k]] = np.clip(np.rint(left[:, k] / step), -8, 7) * step
        error = (left[:, k] - paper[:, order[k]]) / inverse[k, k]
        left[:, k:] -= np.outer(error, inverse[k, k:])
    same = (np.abs(chosen - paper) < 1e-6).all(axis=1)
    assert same.mean() >= 0.9  # float32 may round a tie the other way, which changes what follows


def test_matrices_packed_together_are_quantised_each_by_itself(
    random: np.random.Generator,
) -> None:
    moment = moment_of(inputs(random, 64))
    parts = [random.standard_normal((n, 64)).astype(np.float32) for n in (5, 8)]
    packed, _ = both(np.concatenate(parts), moment, 4, 32)
    np.testing.assert_array_equal(
        packed, np.concatenate([both(p, moment, 4, 32)[0] for p in parts])
    )


def test_padding_and_idle_inputs_get_no_codes(random: np.random.Generator) -> None:
    x = inputs(random, 40)
    x[:, 7] = 0
    weight = random.standard_normal((3, 40)).astype(np.float32)
    weight[:, 9] = 0
    codes, _ = chosen_by(Feedback(moment_of(x), 32), weight, 8, 32)
    assert (codes[:, 1, 8:] == 128).all()
    nearest, _ = quantize(weight, 8, 32, FLOAT16, "w")
    assert (codes[:, 0, 7] == nearest[:, 0, 7]).all()


@pytest.mark.parametrize("moment", [np.zeros((32, 32)), np.ones((32, 32))])
def test_inputs_without_any_spread_do(moment: np.ndarray, random: np.random.Generator) -> None:
    weight = random.standard_normal((4, 32)).astype(np.float32)
    chosen, nearest = both(weight, moment.astype(np.float32), 4, 32)
    assert np.isfinite(chosen).all()
    if not moment.any():
        np.testing.assert_array_equal(chosen, nearest)


def test_weights_too_small_for_a_step_become_zero() -> None:
    weight = np.full((1, 32), 1.6e-39, np.float32)
    choose = Feedback(np.eye(32, dtype=np.float32), 32)
    codes, scales = chosen_by(choose, weight, 4, 32, np.dtype("float32"))
    assert not dequantize(codes, scales, 4, 32).any()


def test_zero_points_leave_less_of_the_error(random: np.random.Generator) -> None:
    moment = moment_of(inputs(random, 128, 40))
    weight = (random.standard_normal((32, 128)) + 0.4).astype(np.float32)
    grid = searched_grid(weight, 4, 32, FLOAT16, moment.diagonal())
    zeros = grid.zeros.astype(np.float32)
    shift = np.repeat(zeros, 32, axis=1)
    nearest = grid.nearest(weight) - shift
    signed = Feedback(moment, 32)(weight, nearest, grid.scales, 4, zeros)
    codes = signed + shift
    assert codes.min() >= 0
    assert codes.max() <= 15
    chosen = grid.weights(codes.astype(np.uint8))
    least = row_errors(weight, grid.weights(grid.nearest(weight)), moment)
    assert row_errors(weight, chosen, moment).sum() < 0.5 * least.sum()
    symmetric, _ = both(weight, moment, 4, 32)
    assert row_errors(weight, chosen, moment).sum() < row_errors(weight, symmetric, moment).sum()
