"""Where records come from, as far as generating knows: a table, or a table with something over it.

The seam between whoever feeds a runtime and whatever holds the records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Floats
from edge_memllm.artifact.layout import RecordBuffer, RecordLayout
from edge_memllm.progress import Progress
from edge_memllm.table.table import Fetched, TableStatistics

# Decoded rows of a chunk. Freed blocks below 32 MB are used again, larger ones go back to the
# system and are zeroed anew each time, which costs a fifth of the run.
_CHUNK_BYTES = 16 << 20
_AHEAD = 2  # chunks


class RecordSource(Protocol):
    """Gives records by token id; `edge_memllm.table.table.Table` says what each of these does."""

    @property
    def layout(self) -> RecordLayout:
        """How the records that are read are laid out."""

    @property
    def reader_name(self) -> str:
        """The reader that brings them from storage."""

    @property
    def reader_reason(self) -> str:
        """Why it is that reader."""

    @property
    def statistics(self) -> TableStatistics:
        """What was read so far."""

    def locate(self, token: int) -> tuple[int, int]:
        """Return where the record of a token begins in the file, and its bytes."""

    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon."""

    def fetch(self, ids: NDArray[np.int64], buffer: RecordBuffer) -> Fetched:
        """Put the record of `ids[i]` into slot i of `buffer`."""

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """Return the decoded memory rows of `ids` [U] as float32 [U, L, D]."""

    def embeddings(self, ids: NDArray[np.int64]) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D]."""


class StoredRows:
    """An open table; see `edge_memllm.mixed_precision.RowSource`."""

    def __init__(self, table: RecordSource, context: int, progress: Progress) -> None:
        """Take a table and its model's context; `progress(stage, done, total)` is called often."""
        self.layout = table.layout
        self.context = context
        self._table = table
        self._progress = progress

    def rows(self, ids: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return embeddings [U, D] and rows [U, L, D] of distinct tokens."""
        buffer = RecordBuffer(self.layout, len(ids))
        self._table.fetch(ids, buffer)
        return buffer.embedding(len(ids)).astype(np.float32), buffer.rows(len(ids))

    def chunks(self, stage: str, order: NDArray[np.int64]) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and rows [N, L, D] of tokens, in this order.

        Chunks are read and decoded ahead of their receiver, one of them while storage is read for
        another.
        """
        count = max(1, _CHUNK_BYTES // (4 * self.layout.layers * self.layout.width))
        chunks = [order[start : start + count] for start in range(0, len(order), count)]
        done = 0
        with ThreadPoolExecutor(_AHEAD) as ahead:
            coming = deque(ahead.submit(self.rows, ids) for ids in chunks[:_AHEAD])
            for number, ids in enumerate(chunks):
                found = coming.popleft().result()
                if number + _AHEAD < len(chunks):
                    coming.append(ahead.submit(self.rows, chunks[number + _AHEAD]))
                yield found
                done += len(ids)
                self._progress(stage, done, len(order))


class MemorylessTable:
    """A record source over another one; see `edge_memllm.table.source.RecordSource`.

    Records are read whole, for their embeddings. Thread-safe; owns nothing.
    """

    def __init__(self, table: RecordSource) -> None:
        self.layout = table.layout
        self.reader_name = table.reader_name
        self.reader_reason = table.reader_reason
        self._table = table

    @property
    def statistics(self) -> TableStatistics:
        """What the table below has read so far."""
        return self._table.statistics

    def locate(self, token: int) -> tuple[int, int]:
        """Return where the record of a token begins in the table's file, and its bytes."""
        return self._table.locate(token)

    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon."""
        self._table.announce(ids)

    def fetch(self, ids: NDArray[np.int64], buffer: RecordBuffer) -> Fetched:
        """Fetch as the table does, then make all rows zero. Raises as `Table.fetch`."""
        fetched = self._table.fetch(ids, buffer)
        scales, codes = buffer.wire_bytes(len(ids))
        # With scales, any code stands for zero times its scale; without, a code is a number.
        (scales if scales.size else codes)[:] = 0
        return fetched

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """Return the rows of `ids` [U] as float32 [U, L, D]: zeros."""
        buffer = RecordBuffer(self.layout, len(ids))
        self.fetch(ids, buffer)
        return buffer.rows(len(ids))

    def embeddings(self, ids: NDArray[np.int64]) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D], which stay as they are."""
        return self._table.embeddings(ids)
