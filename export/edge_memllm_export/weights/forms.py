"""The forms that a matrix of few bits can have: what each stores, costs and expects to lose.

Codes are chosen by feedback (`gptq.Feedback`) through the matrix's moment. What that leaves of an
error can be told before: rounding is noise of a step squared over 12, and through the factor
M = U D U^T of the moment its squares add up to ``sum_k D_k step_k^2 / 12`` for each row (Chee et
al., QuIP, 2023). So all forms are weighed by one factor and the blocks' extremes, and only the
chosen one is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.errors import ExportError
from edge_memllm_export.weights.gptq import Feedback
from edge_memllm_export.weights.grids import searched_grid, split_codes, split_zero
from edge_memllm_export.weights.stored_matrix import Blocks, StoredMatrix, packed

_CHUNK = 1 << 22  # weights whose codes are chosen at a time
_SAMPLE = 192  # rows that `measured_share` rounds


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """Codes of ``bits`` in blocks, scales of 16 bits, maybe zero points of each block.

    6 bits are two matrices, of 4 and of 2 bits, whose products are added; so are 8 bits at level 0,
    of 4 bits each, as no kernel multiplies 8 bits with floats fast. Each has its scales.
    """

    bits: int
    block: int
    zero_points: bool = False
    level: int = 4

    def __str__(self) -> str:
        zero = ", zero points" if self.zero_points else ""
        exact = "" if self.level else ", inputs as they are"
        return f"{self.bits} bits in blocks of {self.block}{zero}{exact}"

    @property
    def parts(self) -> tuple[int, ...]:
        """The bits of the matrices whose products are added."""
        if self.bits == 6:
            return (4, 2)
        return (4, 4) if self.bits == 8 and self.level == 0 else (self.bits,)

    @property
    def zero(self) -> int | None:
        """The code of zero; None where each block has one of its own."""
        if self.zero_points:
            return None
        parts = self.parts
        return split_zero(self.bits, parts[1]) if len(parts) == 2 else 2 ** (self.bits - 1)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix [rows, columns]: codes, scales and packed zero points."""
        return rows * sum(self._row_bytes(bits, -(-columns // self.block)) for bits in self.parts)

    def _row_bytes(self, bits: int, blocks: int) -> int:
        zeros = -(-blocks * bits // 8) if self.zero_points else 0
        return blocks * self.block * bits // 8 + 2 * blocks + zeros


_MEASURED = MatrixForm(4, 32)


class WeighedMatrix:
    """A matrix and how much the loss minds errors of it, its moment once factored."""

    def __init__(self, weight: Floats, moment: Floats, shares: Floats) -> None:
        """Take a matrix float32 [N, K], its moment [K, K] and the rows' shares [N] of the damage.

        Both are of `damage.Sensitivity`, in the columns and rows of the matrix.
        """
        self.weight = weight
        self._moment = moment
        self._shares = shares
        self._feedbacks: dict[int, Feedback] = {}
        self._shared: dict[MatrixForm, float] = {}

    def expected(self, form: MatrixForm) -> float:
        """Return the damage of the codes in a form, nats per token, before they are made."""
        low, high = self._blocks_reach(form.block)
        if form.zero is None:
            steps = (high - low) / (2**form.bits - 1)
        else:
            below, above = form.zero, 2**form.bits - 1 - form.zero
            # The sign of a scale is free, so the longer side may lie where there are more codes.
            steps = np.minimum(
                np.maximum(-low / below, high / above), np.maximum(-low / above, high / below)
            )
        powers = self._feedback_in(_MEASURED.block).powers[: self.weight.shape[1]]
        powers = np.pad(powers, (0, -len(powers) % form.block))
        spread = np.square(steps) @ powers.reshape(-1, form.block).sum(axis=1)
        return float(self._shares.astype(np.float64) @ spread) / 24

    def stored(self, form: MatrixForm, scale_dtype: np.dtype, name: str) -> StoredMatrix:
        """Return the matrix in a form. Raises ExportError for scales beyond ``scale_dtype``."""
        feedback = self._feedback_in(form.block)
        rows, columns = self.weight.shape
        step = max(1, _CHUNK // columns)
        found = [
            self._chunk(form, feedback, slice(start, start + step), scale_dtype, name)
            for start in range(0, rows, step)
        ]
        codes, scales, zeros = (
            np.concatenate([each[place] for each in found]) for place in range(3)
        )
        return StoredMatrix(_parts(form, columns, codes, scales, zeros), level=form.level)

    def measured_share(self, form: MatrixForm = _MEASURED) -> float:
        """Return what codes really cost of what `expected` says, measured on some of the rows.

        It is nearly the same for all forms of 4 bits and more (docs/results/few-bits.md). Grids of
        2 bits clip most extremes, by how much depends on the block.
        """
        if form.bits != 2:
            form = _MEASURED
        if form not in self._shared:
            self._shared[form] = self._measure(form)
        return self._shared[form]

    def _measure(self, form: MatrixForm) -> float:
        rows = np.unique(np.linspace(0, len(self.weight) - 1, _SAMPLE).astype(np.intp))
        some = WeighedMatrix(self.weight[rows], self._moment, self._shares[rows])
        some._feedbacks = self._feedbacks
        expected = some.expected(form)
        missed = some.stored(form, np.dtype(np.float32), "").weights() - some.weight
        found = np.einsum("nk,nk->n", missed @ self._moment, missed)
        real = float(some._shares.astype(np.float64) @ found) / 2
        return real / expected if expected > 0 else 1.0

    def _feedback_in(self, block: int) -> Feedback:
        """That of rows which are filled up to whole blocks."""
        width = -(-len(self._moment) // block) * block
        if width not in self._feedbacks:
            self._feedbacks[width] = Feedback(self._moment, block)
        return self._feedbacks[width]

    @cached_property
    def _extremes(self) -> dict[int, tuple[Floats, Floats]]:
        return {}

    def _blocks_reach(self, block: int) -> tuple[Floats, Floats]:
        """The least and the greatest weight of each block [N, blocks], zero among them."""
        if block not in self._extremes:
            blocks = _in_blocks(self.weight, block)
            reach = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
            self._extremes[block] = reach
        return self._extremes[block]

    def _chunk(
        self, form: MatrixForm, feedback: Feedback, rows: slice, dtype: np.dtype, name: str
    ) -> tuple[Bytes, Floats, Bytes]:
        """Codes [n, blocks * G] from 0 on, scales and zeros [n, blocks] of some rows."""
        weight = _in_blocks(self.weight[rows], form.block)
        flat = weight.reshape(len(weight), -1)
        importance = np.pad(self._moment.diagonal(), (0, flat.shape[1] - self.weight.shape[1]))
        grid = searched_grid(flat, form.bits, form.block, dtype, importance, form.zero)
        if not np.isfinite(grid.scales).all():
            raise ExportError(
                f"{name}: a weight between rows {rows.start} and {rows.start + len(flat)} is not "
                f"finite or too large for {np.dtype(dtype).name} scales. Mend the checkpoint, or "
                "export with graph weights fp32."
            )
        zeros = grid.zeros.astype(np.float32)
        spread = np.repeat(zeros, form.block, axis=1)
        nearest = grid.nearest(flat).astype(np.float32) - spread
        signed = feedback(flat, nearest, grid.scales, form.bits, grid.zeros)
        codes = (signed + spread).astype(np.uint8)
        return codes, grid.scales.astype(dtype), grid.zeros


def _parts(
    form: MatrixForm, columns: int, codes: Bytes, scales: np.ndarray, zeros: Bytes
) -> tuple[Blocks, ...]:
    """Codes [N, blocks * G] as the matrices that they are stored in."""
    apart = codes.reshape(*scales.shape, form.block)
    if len(form.parts) == 2:
        high_bits, low_bits = form.parts
        high, low = split_codes(apart, low_bits)
        larger = scales * np.asarray(2**low_bits, scales.dtype)
        return (
            Blocks(columns, high_bits, packed(high, high_bits), larger),
            Blocks(columns, low_bits, packed(low, low_bits), scales),
        )
    points = packed(zeros, form.bits) if form.zero_points else None
    return (Blocks(columns, form.bits, packed(apart, form.bits), scales, points),)


def _in_blocks(weight: Floats, block: int) -> Floats:
    """A matrix [N, K] as [N, blocks, block], filled up with zeros."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block)))
    return padded.reshape(len(weight), -1, block)
