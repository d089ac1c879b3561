"""A target and the table it is for: which allocations it leaves room for, and the best of them.

Sizes are exact: they are taken from the layout that the table will have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edge_memllm.codecs.allocation import Allocation
from edge_memllm.codecs.mixed import MixedCodec
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision.candidates import Candidates, candidate_ids
from edge_memllm.mixed_precision.class_forms import Values
from edge_memllm.mixed_precision.solver import Problem, Solution, solve
from edge_memllm.mixed_precision.target import Target
from edge_memllm.records import RecordLayout

_CLASSES = 8  # twice as many take off a twentieth of the divergence


@dataclass(frozen=True)
class Sizing:
    """What a table may take. The codec of `layout` does not matter."""

    target: Target
    layout: RecordLayout
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

    def fill(self, weights: Values, candidates: Candidates) -> tuple[Allocation, float]:
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
        layout = replace(self.layout, codec=MixedCodec.of(allocation))
        return self.target.taken(layout, self.vocab_size)

    def described(self, taken: int) -> str:
        """Return bytes in the unit of the target."""
        return self.target.described(taken, self.layout, self.vocab_size)

    def _taken_by_all(self, codec: str) -> int:
        return self.taken(self._all(codec))

    def _all(self, codec: str) -> Allocation:
        class_of = np.zeros(self.vocab_size, np.uint8)
        return Allocation(((codec,) * self.layout.layers,), class_of)


def _allocation(solution: Solution, ids: tuple[str, ...], weights: Values) -> Allocation:
    """Return a solution as an allocation, the class of the heaviest tokens first."""
    sums = np.bincount(solution.class_of, weights.sum(axis=1))
    order = np.argsort(-sums / np.bincount(solution.class_of), kind="stable")
    classes = [
        tuple(ids[each] for each in solution.forms[number].chosen) for number in order.tolist()
    ]
    return Allocation(tuple(classes), np.argsort(order).astype(np.uint8)[solution.class_of])
