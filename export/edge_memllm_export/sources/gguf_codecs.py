"""Blocks of a GGUF file as the bytes of a codec that holds them bit for bit.

Where a network scales what is stored, codes stay and scales are multiplied and rounded to float16,
which changes nothing where the factor is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_memllm.arrays import Bytes, Floats, Ids
from edge_memllm.codecs.wire import pack
from edge_memllm_export.sources.gguf_grids import Grid

GridRows = Callable[[int, int], Grid | None]  # rows from the first to before the second

_LOOKED_AT = 64  # rows that the network's own are compared with
_SAME = 1e-6  # of two products in float32


@dataclass(frozen=True)
class _Holder:
    """The codec that holds a type of blocks, and the code that stands for 0."""

    codec: str
    zero: int = 0
    bits: int = 4
    halves: bool = False  # whether it gives float16, and no more


_HOLDERS = {
    "Q4_0": _Holder("int4-g32", zero=8),
    "Q4_1": _Holder("int4a-g32", halves=True),
    "Q5_0": _Holder("int5-g32", zero=16, bits=5),
    "Q8_0": _Holder("int8-g32", zero=128, bits=8),
}


class KeptGrid:
    """A matrix [V, n] of a row for each token, in a codec that holds its blocks."""

    def __init__(self, grid: GridRows, kind: str, factor: float) -> None:
        self._grid = grid
        self._holder = _HOLDERS[kind]
        self._kind = kind
        self._factor = factor

    @property
    def codec(self) -> str:
        """The codec's id."""
        return self._holder.codec

    @property
    def note(self) -> str:
        """What becomes of the blocks."""
        times = f"its scales times {self._factor:g}"
        exactly = ", exactly" if math.frexp(self._factor)[0] == 0.5 else ""
        how = "bit for bit" if self._factor == 1 else f"{times}{exactly}"
        return f"{self._kind} is kept as {self.codec}, {how}"

    def stored(self, ids: Ids) -> tuple[Bytes, Bytes]:
        """The codec's bytes of tokens [N]: scales, with minima behind them if any, and codes."""
        part = _rows_of(self._grid, ids)
        numbers = [part.scales] if part.minima is None else [part.scales, part.minima]
        with np.errstate(over="ignore"):  # who stores them compares
            halves = (np.concatenate(numbers, axis=1) * np.float32(self._factor)).astype("<f2")
        codes = (part.codes.astype(np.int16) + self._holder.zero).astype(np.uint8)
        bits = self._holder.bits
        return halves.view(np.uint8), codes if bits == 8 else pack(codes, bits)


def kept_grid(
    grid: GridRows, network: Callable[[Ids], Floats], vocab_size: int, dtype: str
) -> KeptGrid | None:
    """A matrix in the codec that holds it where the graph is fed `dtype`; None if none does.

    `grid` gives its rows as they are stored, `network` those of tokens [N] as they are computed
    with, [N, n]: one number times the stored ones.
    """
    first = grid(0, 1)
    holder = None if first is None else _HOLDERS.get(first.kind)
    if first is None or holder is None or (holder.halves and dtype == "float32"):
        return None
    factor = _factor(grid, network, vocab_size)
    return None if factor is None else KeptGrid(grid, first.kind, factor)


def _factor(grid: GridRows, network: Callable[[Ids], Floats], vocab_size: int) -> float | None:
    """What the network's rows are of the grid's; None where that is not one number."""
    ids = np.unique(np.linspace(0, vocab_size - 1, _LOOKED_AT).astype(np.int64))
    found = network(ids)
    stored = np.concatenate([_rows_of(grid, ids[i : i + 1]).weights() for i in range(len(ids))])
    place = np.unravel_index(np.abs(stored).argmax(), stored.shape)
    if stored[place] == 0:
        return None
    factor = float(found[place]) / float(stored[place])
    whole = round(factor)
    factor = float(whole) if whole and abs(factor / whole - 1) <= _SAME else factor
    same = np.abs(stored * factor - found) <= _SAME * np.abs(found)
    return factor if same.all() else None


def _rows_of(grid: GridRows, ids: Ids) -> Grid:
    """The grid of some rows, in their order."""
    first, last = int(ids.min()), int(ids.max())
    part = grid(first, last + 1)
    assert part is not None  # all rows are of one type
    if len(ids) == last + 1 - first and (np.diff(ids) == 1).all():
        return part
    minima = None if part.minima is None else part.minima[ids - first]
    return Grid(part.kind, part.codes[ids - first], part.scales[ids - first], minima, part.block)
