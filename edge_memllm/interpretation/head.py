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

from edge_memllm.arrays import Floats, Ids
from edge_memllm.errors import RequestError
from edge_memllm.progress import Progress

_CHUNK_BYTES = 32 << 20
# Of the mean variance of the directions, added to each: keeps changes short where the vocabulary
# says little. Anything from a thousandth to a tenth gives the same figures.
_RIDGE = 0.1


class Highest:
    """The `count` highest values of each of C columns, and whose they are.

    Of equal values those of the lowest ids stay, in whatever order and parts they come.
    """

    def __init__(self, count: int, columns: int) -> None:
        self._count = count
        self.values: Floats = np.empty((0, columns), np.float32)  # [<= count, C], falling
        self.ids: Ids = np.empty((0, columns), np.int64)

    def add(self, ids: Ids, values: Floats) -> None:
        """Take rows [N, C] of `ids` [N], none of which came before."""
        if len(ids) > self._count:  # sorting is for the few that may stay
            bound = -np.partition(-values, self._count - 1, axis=0)[self._count - 1]
            kept = (values >= bound).any(axis=1)
            ids, values = ids[kept], values[kept]
        every = np.concatenate([self.values, values])
        owners = np.concatenate([self.ids, np.broadcast_to(ids[:, None], values.shape)])
        best = np.lexsort((owners, -every), axis=0)[: self._count]
        self.values = np.take_along_axis(every, best, axis=0)
        self.ids = np.take_along_axis(owners, best, axis=0)


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


class WordDirections:
    """Readings [N, W] of vectors [N, D] for W words, and changes [N, D] for readings."""

    def __init__(self, directions: Floats, spread: NDArray[np.float64] | None = None) -> None:
        """Take the words' directions [W, D] and, as `spread` [D, D], what changes shall spare.

        `spread` is the mean of d d^T over the vocabulary (`vocabulary_spread`); None changes rows
        as little as possible instead. Raises `RequestError` for more words than a row can tell
        apart.
        """
        count, width = directions.shape
        if count > width // 2:
            raise RequestError(
                f"{count} tokens are too many to turn down at once: rows have {width} values, so "
                f"at most {width // 2}. Name fewer words."
            )
        self.directions = directions
        exact = directions.astype(np.float64)
        cheap = exact.T if spread is None else np.linalg.solve(_ridged(spread), exact.T)
        # The pseudo-inverse, because tokens that were never trained may share a direction.
        inverse = np.linalg.pinv(exact @ cheap, rcond=1e-10, hermitian=True)
        self._change = (cheap @ inverse).astype(np.float32)  # [D, W]

    def read(self, vectors: Floats) -> Floats:
        """Return what vectors [N, D] add to the logits of the words, [N, W]."""
        read: Floats = vectors @ self.directions.T
        return read

    def change(self, readings: Floats) -> Floats:
        """Return the cheapest vectors [N, D] whose readings are these, [N, W]."""
        change: Floats = readings @ self._change.T
        return change


def vocabulary_spread(head: Head, progress: Progress = lambda *_: None) -> NDArray[np.float64]:
    """Return the mean of d d^T [D, D] over the directions d of all tokens, streamed."""
    width = len(head.norm)
    chunk = max(1, _CHUNK_BYTES // (4 * width))
    spread = np.zeros((width, width))
    for start in range(0, head.vocabulary, chunk):
        ids = np.arange(start, min(start + chunk, head.vocabulary))
        directions = head.directions(ids)
        spread += directions.T @ directions
        progress("head", int(ids[-1]) + 1, head.vocabulary)
    found: NDArray[np.float64] = spread / head.vocabulary
    return found


def _ridged(spread: NDArray[np.float64]) -> NDArray[np.float64]:
    width = len(spread)
    ridged: NDArray[np.float64] = spread + _RIDGE * np.trace(spread) / width * np.eye(width)
    return ridged
