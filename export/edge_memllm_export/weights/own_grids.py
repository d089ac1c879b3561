"""Grids that weights lie on already, as training that is aware of quantisation leaves them.

Such weights are whole numbers times a step, one for each row or for each block of 32 of a row. No
rounding is to move them: neither another step, nor factors for columns, nor feedback. What the file
rounded behind the grid, to bfloat16 for instance, is taken off again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edge_memllm.arrays import Floats
from edge_memllm_export.weights.stored_matrix import Blocks, packed

_BLOCK = 32  # of steps of parts of a row
_LOOKED_AT = 16  # rows that say for most matrices that there is no grid
_CHUNK = 1 << 20  # weights looked at a time
_SAME = 2.0**-8  # of a weight: its own rounding to bfloat16, and that of a step to float16
_BITS = (2, 4, 8)  # what products take
_SMALLEST = (1, 2, 3)  # the least code but zero that a block may have


class OwnGrid(NamedTuple):
    """Weights [N, K] are ``codes * steps``.

    Attributes:
        bits: Of 2, 4 and 8 the fewest that hold the codes.
        steps: [N, groups], exact in float16; negative where codes reach further above zero.
        group: Weights of a row that share a step.
    """

    bits: int
    steps: Floats
    group: int

    def fits(self, bits: int, block: int) -> bool:
        """Whether codes of so many bits in blocks of ``block`` hold it."""
        return bits >= self.bits and (self.steps.shape[1] == 1 or block == self.group)

    def stored(self, weight: np.ndarray, bits: int, block: int, scale_dtype: np.dtype) -> Blocks:
        """The weights [N, K] in a form that fits."""
        rows, columns = weight.shape
        blocks = -(-columns // block)
        scales = np.broadcast_to(self.steps, (rows, blocks)).astype(scale_dtype)
        codes = np.empty((rows, blocks, block * bits // 8), np.uint8)
        middle = 2 ** (bits - 1)
        for part in _parts(weight):
            filled = np.zeros((len(weight[part]), blocks * block), np.float32)
            filled[:, :columns] = weight[part]
            steps = scales[part].astype(np.float32)[..., None]
            signed = _whole(filled.reshape(len(filled), blocks, block), steps)
            codes[part] = packed(signed + middle, bits)
        return Blocks(columns, bits, codes, scales)


def own_grid(weight: np.ndarray) -> OwnGrid | None:
    """Return the grid that weights [N, K] of any float dtype lie on, None without one."""
    columns = weight.shape[1]
    for group in (columns, _BLOCK):
        if columns % group or columns < _BLOCK:
            continue
        if _steps(weight[:_LOOKED_AT], group) is None:
            continue
        found = [_steps(weight[part], group) for part in _parts(weight)]
        if all(each is not None for each in found):
            known = [each for each in found if each is not None]
            steps = np.concatenate([each for each, _ in known])
            return OwnGrid(max(bits for _, bits in known), steps, group)
    return None


@np.errstate(over="ignore", invalid="ignore")  # weights that are no numbers are on no grid
def _steps(weight: np.ndarray, group: int) -> tuple[Floats, int] | None:
    """Steps [n, groups] of some rows and the bits that hold their codes; None without a grid."""
    groups = weight.astype(np.float32).reshape(-1, group)
    sizes = np.abs(groups)
    least = np.where(sizes > 0, sizes, np.float32(np.inf)).min(axis=1, keepdims=True)
    least[~np.isfinite(least)] = 0
    steps = np.zeros_like(least)
    missing = np.ones(len(groups), bool)
    for smallest in _SMALLEST:
        some = groups[missing]
        tried = _fitted(some, least[missing] / np.float32(smallest))
        codes = _whole(some, tried)
        near = (np.abs(codes * tried - some) <= np.float32(_SAME) * np.abs(some)).all(axis=1)
        near &= np.abs(codes).max(axis=1) <= 2 ** (_BITS[-1] - 1)
        places = np.flatnonzero(missing)[near]
        steps[places], missing[places] = tried[near], False
        if not missing.any():
            break
    else:
        return None
    codes = _whole(groups, steps)
    low, high = codes.min(axis=1, keepdims=True), codes.max(axis=1, keepdims=True)
    steps = np.where(high > -low, -steps, steps)
    long, short = np.maximum(-low, high).max(initial=0), np.minimum(-low, high).max(initial=0)
    for bits in _BITS:
        if long <= 2 ** (bits - 1) and short < 2 ** (bits - 1):
            return steps.reshape(len(weight), -1), bits
    return None


def _fitted(groups: Floats, steps: Floats) -> Floats:
    """Steps [M, 1] in the middle of what weights say by the codes of these, in float16."""
    codes = _whole(groups, steps)
    used = codes != 0
    said = np.divide(groups, codes, out=np.zeros_like(groups), where=used)
    high = said.max(axis=1, keepdims=True)
    low = np.where(used, said, high).min(axis=1, keepdims=True)
    halves: Floats = ((low + high) / 2).astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(halves), halves, np.float32(0))


def _whole(values: Floats, steps: Floats) -> Floats:
    """Values in whole steps, zero where a step is."""
    divided = np.divide(values, steps, out=np.zeros_like(values), where=steps != 0)
    return np.rint(divided, out=divided)


def _parts(weight: np.ndarray) -> list[slice]:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]
