"""What every cache of keys and values does: count valid positions and grow in steps.

Memory grows with the text, never to the whole context up front. Knows no library; where the
values lie is the business of the runtime that derives from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from edge_memllm.errors import EdgeMemLLMError, RequestError

FIRST_CAPACITY = 256


def grown_capacity(needed: int, context: int) -> int:
    """Return 256, doubled until it holds `needed` positions, at most the context."""
    capacity = FIRST_CAPACITY
    while capacity < needed:
        capacity *= 2
    return min(capacity, context)


class GrowingCache(ABC):
    """Lengths and capacity of a batch; see `edge_memllm.runtime_protocol.KVCache`."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch = batch
        self.context = context
        self.capacity = 0
        self.lengths = np.zeros(batch, np.int32)
        self.closed = False

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by keys and values."""

    @abstractmethod
    def _grow(self, capacity: int) -> None:
        """Make room for exactly `capacity` positions, keeping what is there."""

    @abstractmethod
    def _free(self) -> None:
        """Free the memory."""

    def close(self) -> None:
        """Free the memory; the cache cannot be used any more."""
        self._free()
        self.capacity = 0
        self.closed = True

    def ensure(self, capacity: int) -> None:
        """Make room for at least `capacity` positions."""
        if self.closed:
            raise ValueError("the cache is closed, expected an open one from new_cache.")
        if capacity <= self.capacity:
            return
        if capacity > self.context:
            raise RequestError(
                f"{capacity} positions are needed and the model's context has {self.context}. "
                "Shorten the prompt or ask for fewer tokens."
            )
        grown = grown_capacity(capacity, self.context)
        try:
            self._grow(grown)
        except MemoryError as error:
            self.close()  # some of it may be gone
            raise EdgeMemLLMError(
                f"There is no memory for keys and values of {self.batch} x {grown} positions "
                f"({error}). Use a shorter text or fewer prompts at once."
            ) from error
        self.capacity = grown

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from `length` on."""
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"length is {length}, expected 0 to {self.lengths[sequence]}.")
        self.lengths[sequence] = length

    def active(self, sequence: int | None) -> slice:
        """Return the sequences that a step advances: one, or all."""
        return slice(None) if sequence is None else slice(sequence, sequence + 1)
