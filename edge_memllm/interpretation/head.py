"""Reading a vector through the head: which output tokens it makes likelier, and which less so.

A vector m that is added to the stream adds (m * w) . h_t to the logit of token t, up to the final
norm's common factor 1 / rms, where w is the weight of that norm and h_t the token's row of the
head. What it adds to all logits alike changes no probability, so the mean over the vocabulary is
left out everywhere. Streams over the vocabulary; knows nothing of where the matrices lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_memllm.interpretation.extremes import Highest

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Reading:
    """What a vector does to the logits: token ids and what is added to them, the most first."""

    promotes: tuple[Ids, Floats]
    suppresses: tuple[Ids, Floats]


class Head:
    """The head's matrix [V, D] behind the weight [D] of the final norm."""

    def __init__(self, rows: Callable[[Ids], Floats], vocabulary: int, norm: Floats) -> None:
        """Take `rows`, which gives float32 rows [N, D] of the head for token ids [N]."""
        self.vocabulary = vocabulary
        self.norm = norm
        self._rows = rows
        self._chunk = max(1, _CHUNK_BYTES // (4 * len(norm)))

    @cached_property
    def mean(self) -> Floats:
        """The mean row of the head, [D]."""
        total = np.zeros(len(self.norm))
        for ids in self._chunks():
            total += self._rows(ids).sum(axis=0, dtype=np.float64)
        mean: Floats = (total / self.vocabulary).astype(np.float32)
        return mean

    def directions(self, ids: Ids) -> Floats:
        """Return [N, D]: m . direction is what a vector m adds to the logit of each token.

        Less the mean over the vocabulary, and up to the factor 1 / rms.
        """
        found: Floats = self.norm * (self._rows(ids) - self.mean)
        return found

    def mean_direction(self) -> Floats:
        """Return [D]: what was left out of every direction."""
        found: Floats = self.norm * self.mean
        return found

    def read(
        self, vectors: Floats, count: int, progress: Progress = lambda *_: None
    ) -> list[Reading]:
        """Return the `count` tokens that each of the vectors [N, D] raises and lowers most."""
        columns = (vectors * self.norm).T
        raised, lowered = Highest(count, len(vectors)), Highest(count, len(vectors))
        offset = self.mean @ columns
        for ids in self._chunks():
            added = self._rows(ids) @ columns - offset  # [chunk, N]
            raised.add(ids, added)
            lowered.add(ids, -added)
            progress("head", int(ids[-1]) + 1, self.vocabulary)
        return [
            Reading(
                (raised.ids[:, number], raised.values[:, number]),
                (lowered.ids[:, number], -lowered.values[:, number]),
            )
            for number in range(len(vectors))
        ]

    def _chunks(self) -> list[Ids]:
        starts = range(0, self.vocabulary, self._chunk)
        return [np.arange(at, min(at + self._chunk, self.vocabulary)) for at in starts]
