"""Records that a network computes when they are asked for, in place of a table that holds them.

With it and the torch reference, whatever runs on an artifact runs on a checkpoint: texts, tasks,
gains. Exact and slow. Knows a memory; nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs import get_codec
from edge_memllm.records import RecordBuffer, RecordLayout
from edge_memllm.table import Fetched, TableStatistics

if TYPE_CHECKING:
    from edge_memllm.interpretation.network_memory import NetworkMemory

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class NetworkRecords:
    """See `edge_memllm.record_source.RecordSource`; records are float32 and come from nowhere."""

    reader_name = "network"
    reader_reason = "a checkpoint has no table"
    statistics = TableStatistics()

    def __init__(self, memory: NetworkMemory) -> None:
        self._memory = memory
        codec = get_codec("f32" if memory.layers else "none")
        self.layout = RecordLayout(memory.layers, memory.width, codec, "float32")

    def locate(self, token: int) -> tuple[int, int]:
        """Return the record's place among all, as a table in the order of ids would have it."""
        return token * self.layout.stride, self.layout.record_bytes

    def announce(self, ids: Iterable[int]) -> None:
        """Nothing can be read ahead."""

    def fetch(self, ids: Ids, buffer: RecordBuffer) -> Fetched:
        """Compute the record of `ids[i]` into slot i of `buffer`."""
        buffer.embedding(len(ids))[:] = self.embeddings(ids)
        for wire in buffer.wire(len(ids)).values():
            wire[:] = self.rows(ids).reshape(len(ids), -1)
        return Fetched(0, 0)

    def rows(self, ids: Ids) -> Floats:
        """Return the memory rows of `ids` [U] as float32 [U, M, D]."""
        return self._memory.all_rows(ids)

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D]."""
        return self._memory.embeddings(ids)
