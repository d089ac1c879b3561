"""Factors for the columns of a matrix that make it easier to round, and that cancel elsewhere.

A column times a factor gives the same product when what feeds it is divided by that factor: the
weights of a norm, or the rows of ``v_proj`` or ``up_proj``. Blocks lie along a row, so columns of a
block share a scale: those whose inputs matter more should be larger, and all should be alike.
The powers were found by trial (docs/results/few-bits.md). It knows numpy and no networks.
"""

from __future__ import annotations

import numpy as np

from edge_memllm.arrays import Floats

_INPUT_POWER, _WEIGHT_POWER = 0.25, -0.75
_MOST = 8  # times, and one over it: float16 has to hold what is divided


def column_factors(weight: Floats, power: Floats, shared: int = 1, width: int = 1) -> Floats:
    """Return float32 factors [K], of geometric mean 1 before they are limited, for a matrix [N, K].

    ``power`` [K] is the mean square of each input, weighted or not: a moment's diagonal. Columns
    lie in heads of ``width``; every ``shared`` heads in turn get the same factors, as they read the
    same value head. A column without weights or inputs counts as the smallest that has some.
    """
    size = np.log(_present(np.sqrt(np.square(weight).mean(axis=0))))
    fed = np.log(_present(np.sqrt(power)))
    exponents = _INPUT_POWER * fed + _WEIGHT_POWER * size
    heads = exponents.reshape(-1, shared, width)
    alike = np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)
    factors: Floats = np.exp(alike - alike.mean()).clip(1 / _MOST, _MOST).astype(np.float32)
    return factors


def folded_moment(moment: Floats, factors: Floats) -> Floats:
    """Return the moment [K, K] of inputs that were divided by the factors."""
    folded: Floats = moment / factors[:, None] / factors
    return folded


def _present(sizes: Floats) -> Floats:
    """Sizes with zeros replaced by the least of the others, by one where all are zero."""
    return np.maximum(sizes, sizes[sizes > 0].min(initial=sizes.max() or 1))
