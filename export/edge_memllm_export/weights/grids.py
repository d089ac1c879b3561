"""Grids of blocks: the scale and the zero point that the weights of each block are rounded on.

``weight = (code - zero) * scale``, the form of ``MatMulNBits`` with zero points of its own, which
are whole numbers. The grid between the least and the greatest weight of a block is not the best
one: many of its values are spent on the rarest weights. So several narrower ones are tried, each
mended by least squares, and the least error wins, weighted by how large each column's inputs are.
It knows numpy, no networks and no graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edge_memllm.arrays import Bytes, Floats

# Tried widths of a grid, in parts of the distance between a block's extremes. With 2 bits it is
# best to clip far more, which takes a sixth off the error of blocks of 128.
_WIDTHS = np.linspace(1.05, 0.65, 9, dtype=np.float32)
_WIDTHS_OF_2_BITS = np.linspace(1.05, 0.35, 9, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """What the blocks of a matrix [N, blocks * G] are rounded to."""

    bits: int
    scales: Floats  # [N, blocks], each exact in the dtype it will be stored in
    zeros: Bytes  # [N, blocks]: the code that stands for zero

    def nearest(self, weight: Floats) -> Bytes:
        """Return the nearest codes [N, blocks * G] of weights of that shape."""
        blocks = weight.reshape(*self.scales.shape, -1)
        codes = np.rint(blocks * _inverse(self.scales)[..., None]) + self.zeros[..., None]
        clipped = np.clip(codes, 0, 2**self.bits - 1)
        return clipped.astype(np.uint8).reshape(weight.shape)

    def weights(self, codes: Bytes) -> Floats:
        """Return the float32 weights [N, blocks * G] that codes stand for."""
        signed = codes.reshape(*self.scales.shape, -1).astype(np.float32) - self.zeros[..., None]
        weights: Floats = (signed * self.scales[..., None]).reshape(codes.shape)
        return weights


def searched_grid(
    weight: Floats,
    bits: int,
    block: int,
    scale_dtype: np.dtype,
    importance: Floats | None = None,
    zero: int | None = None,
) -> BlockGrid:
    """Return the grid of least error for rounding to the nearest code.

    ``weight`` is float32 [N, blocks * block] and finite; ``importance`` [blocks * block] says how
    much a squared error in each column counts, the mean square of its inputs for instance. None
    counts all alike. ``zero`` is the zero point of all blocks, None searches for that of each. A
    scale beyond the range of ``scale_dtype`` is infinite, as in `quantize`.
    """
    blocks = weight.reshape(len(weight), -1, block)
    columns = np.ones(weight.shape[1], np.float32) if importance is None else importance
    search = _Search(blocks, _counted(columns.reshape(1, -1, block)), bits, scale_dtype)
    for scales, zeros in _starts(blocks, bits) if zero is None else _around(blocks, bits, zero):
        codes = search.offer(scales, zeros)
        search.offer(search.least_squares(codes, zeros), zeros)
    return BlockGrid(bits, search.scales, search.zeros.astype(np.uint8))


def split_zero(bits: int, low_bits: int) -> int:
    """The code of zero of codes that `split_codes` takes."""
    return int(2 ** (bits - 1) + 2 ** (low_bits - 1))


def split_codes(codes: Bytes, low_bits: int) -> tuple[Bytes, Bytes]:
    """Split codes into the bits above ``low_bits`` and those, for two matrices over one input.

    Without zero points of their own these have the middle, so with 6 bits and 2 low ones
    ``(code - 34) * scale = (high - 8) * (4 * scale) + (low - 2) * scale``.
    """
    return codes >> np.uint8(low_bits), codes & np.uint8(2**low_bits - 1)


class _Search:
    """The best grid of blocks [N, B, G] so far; scales and zeros are float32 [N, B]."""

    def __init__(
        self, blocks: Floats, importance: Floats, bits: int, scale_dtype: np.dtype
    ) -> None:
        self._blocks, self._importance = blocks, importance
        self._top, self._dtype = 2**bits - 1, scale_dtype
        self.scales = np.zeros(blocks.shape[:2], np.float32)
        self.zeros = np.full(blocks.shape[:2], 2 ** (bits - 1), np.float32)
        self._error = np.full(blocks.shape[:2], np.inf, np.float32)

    def offer(self, scales: Floats, zeros: Floats) -> Floats:
        """Take a grid where it is better, and return the signed codes [N, B, G] on it."""
        with np.errstate(over="ignore"):
            stored = scales.astype(self._dtype).astype(np.float32)
        codes = np.rint(self._blocks * _inverse(stored)[..., None])
        low = -zeros[..., None]
        np.clip(codes, low, low + self._top, out=codes)
        with np.errstate(invalid="ignore"):
            missed = np.square(codes * stored[..., None] - self._blocks)
        error = (missed * self._importance).sum(axis=-1)
        better = (error < self._error) | ~np.isfinite(stored)
        for kept, found in ((self.scales, stored), (self.zeros, zeros), (self._error, error)):
            np.copyto(kept, found, where=better)
        return codes

    def least_squares(self, codes: Floats, zeros: Floats) -> Floats:
        """Return the scales that suit signed codes best; that of codes all zero is zero."""
        weighted = codes * self._importance
        power = (weighted * codes).sum(axis=-1)
        fitted = (weighted * self._blocks).sum(axis=-1)
        scales: Floats = np.divide(fitted, power, out=np.zeros_like(power), where=power > 0)
        return scales


def _starts(blocks: Floats, bits: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield scales and zeros [N, B] of grids around the middle between the extremes.

    Zero is always among a grid's values, so that a column without inputs costs nothing.
    """
    low = np.minimum(blocks.min(axis=-1), 0)
    high = np.maximum(blocks.max(axis=-1), 0)
    top = np.float32(2**bits - 1)
    for width in _widths(bits):
        scales = (high - low) * (width / top)
        middle = (high + low) / 2
        zeros = np.rint(top / 2 - middle * _inverse(scales))
        yield scales, np.clip(zeros, 0, top).astype(np.float32)


def _around(blocks: Floats, bits: int, zero: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield scales of either sign, and the one zero point, [N, B]: about what extremes ask for."""
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    below, above = np.float32(zero), np.float32(2**bits - 1 - zero)
    zeros = np.full_like(low, zero)
    for width in _widths(bits):
        yield width * np.maximum(-low / below, high / above), zeros
        yield -width * np.maximum(-low / above, high / below), zeros


def _widths(bits: int) -> Floats:
    return _WIDTHS_OF_2_BITS if bits == 2 else _WIDTHS


def _counted(importance: Floats) -> Floats:
    """Importance [1, B, G] with a little for columns that the text left without inputs."""
    least = importance.mean(axis=-1, keepdims=True) * np.float32(1e-3)
    return np.maximum(importance, np.where(least > 0, least, np.float32(1)))


def _inverse(scales: Floats) -> Floats:
    """One over each scale; zero where that would be infinite, for such a block is zero."""
    usable = np.abs(scales) >= np.finfo(np.float32).tiny
    inverse: Floats = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
    return inverse
