"""A matrix as a graph stores it: blocks of codes whose products add up.

One `Blocks` is what ``com.microsoft.MatMulNBits`` multiplies with. A matrix is a sum of them over
the same inputs (6 bits are one of 4 and one of 2, see `grids.split_codes`). Where its grid does not
go through zero in whole steps, it has columns for sums of inputs besides: with
``w = s (q - z) + r`` in blocks of g, ``y = s (q - z) x + r sum_g(x)``. The rows of one matrix of
the network may be stored in different ways, one after another.
It knows numpy, nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from edge_memllm.arrays import Bytes, Floats

LEVELS = (0, 4)  # 4: MatMulNBits may round inputs to int8 by blocks, which is fast; 0: it may not


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes and scales of a matrix [N, K] in blocks of G weights of a row.

    Attributes:
        columns: K; the last block of a row is filled up.
        bits: 2, 4 or 8.
        codes: [N, blocks, G * bits / 8], the lowest bits first.
        scales: [N, blocks] in the dtype that the graph computes in.
        zeros: [N, ceil(blocks * bits / 8)], the code of zero in each block, packed as codes are;
            None is ``2**(bits - 1)`` everywhere.
    """

    columns: int
    bits: int
    codes: Bytes
    scales: np.ndarray
    zeros: Bytes | None = None

    @property
    def block(self) -> int:
        """G, the weights that share a scale."""
        return self.codes.shape[2] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(
            each.nbytes for each in (self.codes, self.scales, self.zeros) if each is not None
        )

    def weights(self) -> Floats:
        """The float32 matrix [N, K] that is multiplied with."""
        rows, blocks = self.scales.shape
        values = unpacked(self.codes, self.bits).reshape(rows, blocks, -1).astype(np.float32)
        if self.zeros is None:
            values -= 2 ** (self.bits - 1)
        else:
            values -= unpacked(self.zeros, self.bits)[:, :blocks, None]
        values *= self.scales.astype(np.float32)[..., None]
        return values.reshape(rows, -1)[:, : self.columns]


class BlockSums(NamedTuple):
    """Sums of every ``block`` inputs, which follow the inputs themselves ``copies`` times.

    A second copy takes what codes of few bits leave of the first. One product reads all, which
    takes less time than a product of the sums apart, with many rows a third less.
    """

    block: int
    copies: int


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix [N, K], or some rows of one.

    Attributes:
        parts: Their products with the inputs are added.
        sums: What the parts read behind the K inputs, of which there are whole blocks then.
        level: Of `LEVELS`.
    """

    parts: tuple[Blocks, ...]
    sums: BlockSums | None = None
    level: int = 4

    @property
    def rows(self) -> int:
        """N."""
        return len(self.parts[0].codes)

    @property
    def columns(self) -> int:
        """K."""
        read = self.parts[0].columns
        return read if self.sums is None else read * self.sums.block // sum(self.sums)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(part.nbytes for part in self.parts)

    def weights(self) -> Floats:
        """The float32 matrix [N, K] that it stands for."""
        total = self.parts[0].weights()
        for part in self.parts[1:]:
            total += part.weights()
        if self.sums is None:
            return total
        own, of_sums = np.split(total, [self.columns], axis=1)
        per_sum = of_sums.reshape(len(own), self.sums.copies, -1).sum(axis=1)
        whole: Floats = own + np.repeat(per_sum, self.sums.block, axis=1)
        return whole

    def at_level_0(self) -> StoredMatrix:
        """The same matrix, its inputs not rounded; codes of 8 bits in two of 4.

        Codes of 8 bits have no fast kernel at that level, those of 4 bits do.
        """
        parts = (half for part in self.parts for half in _in_4_bits(part))
        return replace(self, parts=tuple(parts), level=0)


# name, weight [N, K] -> its rows in turn; None for a matrix that stays in floats. Called in the
# graph's order.
StoreMatrix = Callable[[str, np.ndarray], Sequence[StoredMatrix] | None]


def in_floats(name: str, weight: np.ndarray) -> None:
    """Store nothing in codes; a `StoreMatrix`."""


def packed(codes: np.ndarray, bits: int) -> Bytes:
    """Codes [..., n] in bytes [..., ceil(n * bits / 8)], the lowest bits first."""
    codes = codes.astype(np.uint8)
    each = 8 // bits
    if each == 1:
        return codes
    if missing := -codes.shape[-1] % each:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    out = codes[..., 0::each].copy()
    for place in range(1, each):
        out |= codes[..., place::each] << np.uint8(bits * place)
    return out


def unpacked(stored: Bytes, bits: int) -> Bytes:
    """Codes [..., n * 8 / bits] of bytes [..., n]."""
    each = 8 // bits
    if each == 1:
        return stored
    mask = np.uint8(2**bits - 1)
    parts = [stored >> np.uint8(bits * place) & mask for place in range(each)]
    found: Bytes = np.stack(parts, axis=-1).reshape(*stored.shape[:-1], -1)
    return found


def _in_4_bits(blocks: Blocks) -> tuple[Blocks, ...]:
    """Blocks of 8 bits as two of 4, ``code = 16 high + low`` and zero points likewise."""
    if blocks.bits != 8:
        return (blocks,)
    stored = np.full(blocks.scales.shape, 128, np.uint8) if blocks.zeros is None else blocks.zeros
    halves = []
    for shift, step in ((4, 16), (0, 1)):
        codes, zeros = (each >> np.uint8(shift) & np.uint8(15) for each in (blocks.codes, stored))
        scales = blocks.scales * blocks.scales.dtype.type(step)
        halves.append(Blocks(blocks.columns, 4, packed(codes, 4), scales, packed(zeros, 4)))
    return tuple(halves)
