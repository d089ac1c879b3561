"""Grids of quantised files in the forms of a graph, with nothing rounded anew.

Codes are those of the file: of 4 bits as they are, of 5, 6 and 8 bits in 8, which is faster than 4
and 2 bits apart. A minimum becomes the nearest whole zero point, and what is left of it a factor of
a sum of inputs (see `stored_matrix`): ``s q + m = s (q - z) + (m + s z)``. Scales are stored in the
graph's float16. Those of K-quants are products of two numbers, which that rounds by a 2,000th at
most; all others are as in the file.
What a file has no grid for is rounded to 8 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.errors import ExportError
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.sources.gguf_grids import Grid, has_grid
from edge_memllm_export.weights.quantizer import quantize
from edge_memllm_export.weights.stored_matrix import Blocks, BlockSums, StoredMatrix, packed

_SCALES = np.dtype(np.float16)
_CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4}  # all others have 8
# What may be left of minima, in mean squares: this part of that of steps. An error of a minimum is
# that of all weights of its block, so it counts as a 300th of what rounding to steps did.
_LEFT = 2.0**-17
_MOST_LEVELS = 4
_BLOCK = 32  # of what is rounded to 8 bits


class GridStore:
    """Stores matrices as a quantised file does; a `StoreMatrix`."""

    def __init__(self, source: Checkpoint, exact_inputs: Collection[str] | None) -> None:
        """Take the file, and the names of matrices whose inputs are not rounded; None: of all."""
        self._source = source
        self._exact_inputs = exact_inputs
        self._kept: Counter[str] = Counter()  # weights by the file's type
        self._anew: Counter[str] = Counter()
        self._exact: list[bool] = []  # of each matrix

    def __call__(self, name: str, weight: np.ndarray) -> Sequence[StoredMatrix]:
        """The rows in turn, neighbours of one type together."""
        parts = self._source.architecture.parts(name)
        shapes = [self._source.architecture.weights[part].shape for part in parts]
        columns = {shape[1] for shape in shapes}
        arranged = (sum(shape[0] for shape in shapes), *columns) != weight.shape  # zeros came in
        found, start = [], 0
        for kind, run in groupby(parts, lambda part: None if arranged else self._grid_of(part)):
            weights = list(run)
            if kind is None:
                rows = sum(len(self._source.architecture.weights[part]) for part in weights)
                stop = len(weight) if arranged else start + rows
                found.append(_anew(weight[start:stop], name))
                self._anew.update(self._source.kinds[part] for part in weights)
            else:
                found.append(kept([self._grid(part) for part in weights], name))
                self._kept.update([kind] * len(weights))
            start += found[-1].rows
        exact = self._exact_inputs is None or name in self._exact_inputs
        self._exact.append(exact)
        return [each.at_level_0() for each in found] if exact else found

    @property
    def summary(self) -> str:
        """What became of the file's matrices so far, by their types."""
        kept = f"kept as they are: {_counted(self._kept)}"
        anew = f"; rounded to 8 bits: {_counted(self._anew)}" if self._anew else ""
        rounded = self._exact.count(False)
        inputs = f"; inputs of {rounded} of {len(self._exact)} products are rounded to 8 bits"
        return kept + anew + (inputs if rounded else "")

    def _grid_of(self, weight: str) -> str | None:
        """The type of a weight, if it is a grid."""
        kind = self._source.kinds[weight]
        return kind if has_grid(GGMLQuantizationType[kind]) else None

    def _grid(self, weight: str) -> Grid:
        grid = self._source.grid(weight)
        assert grid is not None  # its type is one
        return grid


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} x {count}" for kind, count in sorted(kinds.items()))


def _anew(weight: np.ndarray, name: str) -> StoredMatrix:
    codes, scales = quantize(weight, 8, _BLOCK, _SCALES, name)
    return StoredMatrix((Blocks(weight.shape[1], 8, codes, scales),))


class _Columns(NamedTuple):
    """Blocks of some columns of a matrix, unpacked."""

    codes: Bytes  # [N, blocks, G]
    scales: np.ndarray  # [N, blocks], as they are stored
    zeros: Bytes  # [N, blocks]

    def weights(self) -> Floats:
        """What they stand for, [N, blocks * G]."""
        signed = self.codes.astype(np.float32) - self.zeros[..., None]
        whole: Floats = (signed * self.scales.astype(np.float32)[..., None]).reshape(
            len(signed), -1
        )
        return whole

    def stored(self, columns: int, bits: int) -> Blocks:
        """Packed; without zero points where they are what none stands for."""
        whole = bool((self.zeros == 2 ** (bits - 1)).all())
        zeros = None if whole else packed(self.zeros, bits)
        return Blocks(columns, bits, packed(self.codes, bits), self.scales, zeros)


def kept(grids: Sequence[Grid], name: str) -> StoredMatrix:
    """The rows of grids of one kind, in turn.

    Raises:
        ExportError: A number of the file is beyond float16; it names the matrix.
    """
    bits = _CODE_BITS.get(grids[0].kind, 8)
    scales = np.concatenate([grid.scales for grid in grids])
    codes = np.concatenate([grid.codes for grid in grids])
    blocks = codes.reshape(*scales.shape, -1)
    columns = codes.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        if grids[0].minima is None:
            middle = np.uint8(2 ** (bits - 1))
            zeros = np.full(scales.shape, middle)
            own = _Columns(blocks.view(np.uint8) + middle, scales.astype(_SCALES), zeros)
            matrix = StoredMatrix((own.stored(columns, bits),))
        else:
            minima = np.concatenate([grid.minima for grid in grids if grid.minima is not None])
            own, rest = _on_whole_zeros(blocks, scales, minima, bits)
            matrix = _with_rest(own, rest, bits)
    if not np.isfinite(matrix.parts[0].scales).all():
        raise ExportError(
            f"{name}: a scale of the file is too large for float16. Export it with graph weights "
            "fp32."
        )
    return matrix


def _on_whole_zeros(
    codes: Bytes, scales: Floats, minima: Floats, bits: int
) -> tuple[_Columns, Floats]:
    """Blocks with zero points, and what is left of the minima [N, blocks].

    Scales are rounded around the middle of a block's codes: what that does there is in the rest.
    """
    stored = scales.astype(_SCALES)
    steps = stored.astype(np.float32)
    middle = (codes.min(axis=-1).astype(np.float32) + codes.max(axis=-1)) / 2
    minima = minima + (scales - steps) * middle
    zeros = np.rint(np.divide(-minima, steps, out=np.zeros_like(steps), where=steps != 0))
    zeros = np.clip(zeros, 0, 2**bits - 1)
    return _Columns(codes, stored, zeros.astype(np.uint8)), minima + steps * zeros


def _with_rest(own: _Columns, rest: Floats, bits: int) -> StoredMatrix:
    """The matrix whose columns for sums hold ``rest`` [N, sums], in as many levels as it takes.

    Each level begins with a block, as it has scales of its own; what it reads is the end of one
    copy of the sums and the start of the next.
    """
    sums, block = rest.shape[1], own.codes.shape[2]
    across = -(-sums // block) * block
    allowed = _LEFT * float(np.square(own.scales, dtype=np.float64).sum())
    parts = [own]
    for level in range(_MOST_LEVELS):
        order = (level * across + np.arange(sums)) % sums
        parts.append(_rounded(rest[:, order], bits, block))
        rest[:, order] -= parts[-1].weights()[:, :sums]
        if float(np.square(rest, dtype=np.float64).sum()) <= allowed:
            break
    copies = -(-((len(parts) - 2) * across + sums) // sums)
    columns = sums * (block + copies)
    missing = -(-columns // block) - sum(part.codes.shape[1] for part in parts)
    parts.append(_rounded(np.zeros((len(rest), missing * block), np.float32), bits, block))
    whole = _Columns(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)))
    return StoredMatrix((whole.stored(columns, bits),), BlockSums(block, copies))


def _rounded(values: Floats, bits: int, block: int) -> _Columns:
    """Values [N, n], filled up to whole blocks and rounded to nearest without clipping."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % block)))
    blocks = padded.reshape(len(values), -1, block)
    zero = 2 ** (bits - 1)
    scales = (np.abs(blocks).max(axis=-1) / (zero - 1)).astype(_SCALES)
    steps = scales.astype(np.float32)[..., None]
    codes = np.rint(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps != 0))
    codes = np.clip(codes, -zero, zero - 1) + zero
    return _Columns(codes.astype(np.uint8), scales, np.full(scales.shape, zero, np.uint8))
