"""Factors that cancel, and what they take off the error of rounding."""

from __future__ import annotations

import numpy as np

from edge_memllm_export.weights.folding import column_factors, folded_moment
from edge_memllm_export.weights.quantizer import quantize
from support.matrices import dequantize

FLOAT16 = np.dtype("float16")


def error(weight: np.ndarray, moment: np.ndarray) -> float:
    """The mean square error of the outputs when rounded to nearest in 4 bits."""
    missed = dequantize(*quantize(weight, 4, 32, FLOAT16, "w"), 4, weight.shape[1]) - weight
    return float(np.einsum("nk,kj,nj->", missed, moment, missed))


def test_columns_of_unlike_sizes_are_rounded_better(random: np.random.Generator) -> None:
    factors = np.exp(random.standard_normal(128)).astype(np.float32)
    x = (random.standard_normal((300, 128)) / factors).astype(np.float32)
    weight = random.standard_normal((64, 128)).astype(np.float32) * factors
    moment = x.T @ x / np.float32(300)
    found = column_factors(weight, moment.diagonal())
    folded = folded_moment(moment, found)
    np.testing.assert_allclose(folded, (x / found).T @ (x / found) / 300, rtol=1e-3, atol=1e-5)
    assert error(weight * found, folded) < 0.5 * error(weight, moment)


def test_heads_that_share_a_value_head_have_the_same_factors(random: np.random.Generator) -> None:
    weight = random.standard_normal((8, 48)).astype(np.float32)
    factors = column_factors(weight, np.exp(random.standard_normal(48)), shared=3, width=8)
    heads = factors.reshape(2, 3, 8)
    np.testing.assert_array_equal(heads, heads[:, :1].repeat(3, axis=1))
    np.testing.assert_allclose(np.log(factors).mean(), 0, atol=1e-5)


def test_columns_without_weights_or_inputs_get_bounded_factors() -> None:
    weight = np.zeros((4, 6), np.float32)
    np.testing.assert_array_equal(column_factors(weight, np.zeros(6, np.float32)), np.ones(6))
    weight[:, :3] = 1
    power = np.array([1, 0, 1e8, 0, 1, 1], np.float32)
    factors = column_factors(weight, power)
    assert np.isfinite(factors).all()
    assert factors.max() <= 8
    assert factors.min() >= 1 / 8
