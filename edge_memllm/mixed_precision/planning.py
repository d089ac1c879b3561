"""An allocation for a model and a target: what is measured, what is solved, what comes of it.

Knows rows, a runtime and a text's tokens by what they do; nothing of checkpoints and artifacts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Doubles, Ids
from edge_memllm.artifact.layout import TableLayout
from edge_memllm.artifact.sections import MixedLayout
from edge_memllm.artifact.tensor_header import build_header
from edge_memllm.codecs.layered import Allocation
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision.sensitivity import (
    Candidates,
    RowProbe,
    Sample,
    candidate_ids,
    energies,
    measure_candidates,
    sample_windows,
    sensitivities,
)
from edge_memllm.mixed_precision.solver import Problem, Room, Solution, solve
from edge_memllm.progress import Progress
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows, counted

_WORD = re.compile(r"mixed-(\d+(?:\.\d+)?)")
_ANY_IDENTITY = "sha256:" + 64 * "0"

_CLASSES = 8  # twice as many take off a twentieth of the divergence

_MOST = 0.5  # times, for a token that the text lacks: less than one that it has


@dataclass(frozen=True, slots=True)
class Target:
    """One of the two: `bits` per memory value, or `file_bytes`."""

    bits: float | None = None
    file_bytes: int | None = None

    def __str__(self) -> str:
        return self._shown(self.file_bytes or 0) if self.bits is None else f"{self.bits:g} bits"

    def limit(self, layout: TableLayout, vocab_size: int) -> int:
        """Return the bytes that `taken` may come to."""
        if self.bits is None:
            return self.file_bytes or 0
        return int(self.bits * vocab_size * layout.layers * layout.width / 8)

    def taken(self, layout: TableLayout, vocab_size: int) -> int:
        """Return what a table takes: the whole file; or scales, codes and parameters alone."""
        if self.bits is None:
            header = len(build_header(layout, vocab_size, _ANY_IDENTITY))
            return header + layout.table_bytes(vocab_size)
        each = zip(layout.counts(vocab_size), layout.kinds, strict=True)
        records = sum(count * (one.scales_bytes + one.codes_bytes) for count, one in each)
        return records + layout.parameters_bytes

    def room(self, layout: TableLayout) -> Room:
        """Return what counts of a record besides its memory values."""
        if self.bits is None:
            return Room(layout.embedding_bytes, layout.alignment)
        return Room(0, 1)

    def described(self, taken: int, layout: TableLayout, vocab_size: int) -> str:
        """Return what is taken in the unit of this target."""
        if self.bits is None:
            return self._shown(taken)
        return f"{8 * taken / (vocab_size * layout.layers * layout.width):.3f} bits"

    def _shown(self, size: int) -> str:
        return f"{size:,} bytes"


def target_of(word: str) -> Target | None:
    """Return the target that a word such as `mixed-4.5` stands for, None for other words."""
    found = _WORD.fullmatch(word)
    return None if found is None else Target(bits=float(found[1]))


@dataclass(frozen=True)
class Sizing:
    """What a table may take. The codec of `layout` does not matter."""

    target: Target
    layout: TableLayout
    vocab_size: int

    def check(self) -> None:
        """Raise `ExportError` for a target below the smallest or above the largest table."""
        ids = candidate_ids(self.layout.width)
        if not ids:
            raise ExportError(
                f"mixed precision: rows of {self.layout.width} values, expected a multiple of 32. "
                "Choose a table codec without groups, such as f16."
            )
        # In the other order where padding swallows all differences.
        least, most = sorted((self._taken_by_all(ids[0]), self._taken_by_all(ids[-1])))
        if not least <= self.target.limit(self.layout, self.vocab_size) <= most:
            raise ExportError(
                f"target {self.target}: in mixed precision the table of this model takes "
                f"{self.described(least)} to {self.described(most)}. Choose a target in between."
            )

    def fill(self, weights: Doubles, candidates: Candidates) -> tuple[Allocation, float]:
        """Return the best allocation that the target leaves room for, and its expected error.

        `weights` [V, L] say how much the relative error of each row counts. Call `check` before.
        """
        room = self.target.room(self.layout)
        problem = Problem(weights, candidates.errors, candidates.sizes, room, _CLASSES)
        limit = self.target.limit(self.layout, self.vocab_size)
        budget = limit
        while budget > problem.smallest:
            solution = solve(problem, budget)
            allocation = _allocation(solution, candidates.ids, weights)
            surplus = self.taken(allocation) - limit
            if surplus <= 0:
                return allocation, solution.error
            budget -= surplus  # for what is stored besides the records
        everyone = self._all(candidates.ids[0])
        return everyone, float(weights.sum(axis=0) @ candidates.errors[:, 0])

    def taken(self, allocation: Allocation) -> int:
        """Return the bytes that count towards the target."""
        return self.target.taken(MixedLayout.of(self.layout, allocation), self.vocab_size)

    def described(self, taken: int) -> str:
        """Return bytes in the unit of the target."""
        return self.target.described(taken, self.layout, self.vocab_size)

    def _taken_by_all(self, codec: str) -> int:
        return self.taken(self._all(codec))

    def _all(self, codec: str) -> Allocation:
        class_of = np.zeros(self.vocab_size, np.uint8)
        return Allocation(((codec,) * self.layout.layers,), class_of)


def _allocation(solution: Solution, ids: tuple[str, ...], weights: Doubles) -> Allocation:
    """Return a solution as an allocation, the class of the heaviest tokens first."""
    sums = np.bincount(solution.class_of, weights.sum(axis=1))
    order = np.argsort(-sums / np.bincount(solution.class_of), kind="stable")
    classes = [
        tuple(ids[each] for each in solution.forms[number].chosen) for number in order.tolist()
    ]
    return Allocation(tuple(classes), np.argsort(order).astype(np.uint8)[solution.class_of])


def token_shares(tokens: NDArray[np.int64], vocab_size: int) -> NDArray[np.float64]:
    """Return the share of each token [V] in texts like this one; all are above zero."""
    counts = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
    lacking = counts == 0
    once = max(1, int((counts == 1).sum()))
    counts[lacking] = min(_MOST, once / max(1, int(lacking.sum())))
    return np.asarray(counts / counts.sum())


@dataclass(frozen=True)
class ExactModel:
    """A model whose rows are as they were before they are quantised."""

    rows: Rows
    runtime: Runtime  # that computes with these rows
    layout: TableLayout  # of the buffers that it is fed; the codec is fed as floats
    context: int  # the most tokens that it reads at once


@dataclass(frozen=True)
class MixedPlan:
    """Who gets which codec, and what that is expected to cost."""

    allocation: Allocation
    shares: Doubles  # [V], how often each token will come
    predicted_kl: float  # nats per token
    probe: RowProbe

    def measured_kl(self, layout: TableLayout, search: bool) -> float:
        """Return the divergence on the sample by a table's layout, its levels learned."""
        sample = self.probe.sample
        rows = np.empty_like(sample.rows)
        section_of = layout.sections_of(sample.ids)
        for number, kind in enumerate(layout.kinds):
            true, codec = sample.rows[section_of == number], kind.codec
            stored = codec.encode(true, search=search and codec.searches)
            rows[section_of == number] = codec.decode(*stored, *true.shape[1:])
        return float(self.probe.divergences(rows, [slice(None)])[0])


def plan_allocation(
    model: ExactModel,
    tokens: Ids,
    sizing: Sizing,
    *,
    search: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> MixedPlan:
    """Find the allocation of least expected divergence from a model.

    `tokens` are those of a text like the ones the model is for; `search` says whether the table
    will be stored with the best scales. Raises `ExportError` for a text without tokens and a
    target that cannot be.
    """
    sizing.check()
    if not len(tokens):
        raise ExportError("The table text has no tokens. Give more text, or leave it out.")
    windows = sample_windows(tokens, sizing.vocab_size, sizing.layout, model.context)
    ids = np.unique(np.concatenate(windows))
    sample = Sample(windows, ids, model.rows.embeddings(ids), model.rows.rows(ids))
    probe = RowProbe(model.runtime, model.layout, sample)
    candidates = measure_candidates(probe.sample.rows, search)
    sensitivity = sensitivities(probe, lambda *done: progress("sensitivity", *done))
    shares = token_shares(tokens, sizing.vocab_size)
    weights = shares[:, None] * sensitivity * _all_energies(model.rows, sizing.vocab_size, progress)
    allocation, predicted = sizing.fill(weights, candidates)
    return MixedPlan(allocation, shares, predicted, probe)


def _all_energies(source: Rows, vocab_size: int, progress: Progress) -> Doubles:
    chunks = counted(
        source.chunks(np.arange(vocab_size)), vocab_size, lambda *done: progress("energy", *done)
    )
    found = np.concatenate([energies(rows) for _, rows in chunks])
    if not np.isfinite(found).all():
        token, layer = np.argwhere(~np.isfinite(found))[0].tolist()
        raise ExportError(
            f"token {token}, memory row of layer {layer}: not all values are finite. "
            "Check the checkpoint."
        )
    return found
