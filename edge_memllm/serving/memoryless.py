"""Records without memory: those of another source, with all rows zero.

What a model then computes is what it computes with a memory gain of 0, so that requests with and
without memory can share an engine: they differ in their records alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Floats
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Fetched, TableStatistics


class MemorylessTable:
    """A record source over another one; see `edge_memllm.record_source.RecordSource`.

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
