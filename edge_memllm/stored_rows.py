"""The rows of a table as a source for another table. Needs no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Floats
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer

Progress = Callable[[str, int, int], None]

# Decoded rows of a chunk. Freed blocks below 32 MB are used again, larger ones go back to the
# system and are zeroed anew each time, which costs a fifth of the run.
_CHUNK_BYTES = 16 << 20
_AHEAD = 2  # chunks


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
