"""Records of a prompt, chunk by chunk: the next chunk is read while the present one computes.

Two buffers and one thread, made when a prompt first needs them; memory does not grow with the
prompt. Knows ids and buffers; nothing of runtimes, logits or text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from edge_memllm.forking import Workers
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer
from edge_memllm.statistics import StepCosts
from edge_memllm.table import Fetched

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens whose records have been read: token t stands in slot `index[0, t]` of `buffer`."""

    buffer: RecordBuffer
    distinct: int  # records, in the first slots
    index: Ids  # [1, T]
    fetched: Fetched  # what reading them took


class ChunkReader:
    """Reads chunks of tokens, each distinct token once. Close it: it may own a thread."""

    def __init__(self, table: RecordSource, costs: StepCosts) -> None:
        self.table = table
        self.costs = costs
        self._buffers: dict[int, RecordBuffer] = {}
        self._ahead = Workers(1, "edge-memllm-records")

    def read(self, tokens: Sequence[int], place: int = 0) -> Chunk:
        """Read the records of one chunk into the buffer number `place`, waiting for them."""
        start = perf_counter()
        chunk = self._fetch(tokens, place)
        self.costs.wait_seconds += perf_counter() - start
        self.costs.note_records(chunk.distinct, chunk.fetched)
        return chunk

    def chunks(self, tokens: Sequence[int], size: int) -> Generator[Chunk, None, None]:
        """Yield the chunks of `tokens` in order; while one is in use, the next is being read.

        A chunk is valid until the next is asked for. What goes wrong in reading a chunk is raised
        when it is its turn. Close the generator: afterwards nothing is being read any more.
        """
        parts = [tokens[begin : begin + size] for begin in range(0, len(tokens), size)]
        if not parts:
            return
        chunk = self.read(parts[0])
        for number, part in enumerate(parts[1:], 1):
            coming = self._ahead.submit(self._fetch, part, number % 2)
            try:
                yield chunk
            finally:
                self._wait_for(coming)
            chunk = coming.result()
            self.costs.note_records(chunk.distinct, chunk.fetched)
        yield chunk

    def drop_buffers(self) -> None:
        """Give up the memory of the buffers; reading again takes it again."""
        self._buffers.clear()

    def close(self) -> None:
        """Wait for the thread to end, if there is one."""
        self._ahead.close()

    def _fetch(self, tokens: Sequence[int], place: int) -> Chunk:
        distinct, index = number_distinct(tokens)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.capacity < len(distinct):
            buffer = self._buffers[place] = RecordBuffer(self.table.layout, len(distinct))
        fetched = self.table.fetch(distinct, buffer)
        return Chunk(buffer, len(distinct), index, fetched)

    def _wait_for(self, coming: Future[Chunk]) -> None:
        start = perf_counter()
        wait([coming])
        self.costs.wait_seconds += perf_counter() - start


def number_distinct(tokens: Sequence[int]) -> tuple[Ids, Ids]:
    """Return the distinct ids [U] and, as [1, T], which of them stands at each position."""
    slots: dict[int, int] = {}
    index = [slots.setdefault(token, len(slots)) for token in tokens]
    return np.array(list(slots), np.int64), np.array([index], np.int64)
