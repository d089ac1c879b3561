"""What a row adds to the logits of some words, and the change of a row that takes it away.

A row's reading for a word is (row . d), d being the head's direction for it: what the row adds to
the word's logit less the mean over the vocabulary, up to the final norm's common factor. Of all
changes that alter the readings of the words by given amounts, the one taken here moves the logits
of the whole vocabulary least, in the sense of least squares. Knows a head, nothing of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.interpretation.head import Head

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

_CHUNK_BYTES = 32 << 20
# Of the mean variance of the directions, added to each: keeps changes short where the vocabulary
# says little. Anything from a thousandth to a tenth gives the same figures.
_RIDGE = 0.1


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
