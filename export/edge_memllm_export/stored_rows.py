"""The rows of a table as a source for another table. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Floats
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Table

Progress = Callable[[str, int, int], None]

# Decoded rows of a chunk. Freed blocks below 32 MB are used again, larger ones go back to the
# system and are zeroed anew each time, which costs a fifth of the run.
_CHUNK_BYTES = 16 << 20


class StoredRows:
    """An open table; see `edge_memllm.mixed_precision.RowSource`."""

    def __init__(self, table: Table, context: int, progress: Progress) -> None:
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

        The next chunk is read and decoded while its receiver works on the one before, and storage
        is told of the one after that.
        """
        count = max(1, _CHUNK_BYTES // (4 * self.layout.layers * self.layout.width))
        chunks = [order[start : start + count] for start in range(0, len(order), count)]
        done = 0
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.rows, chunks[0])
            for ids, following, later in zip_longest(chunks, chunks[1:], chunks[2:]):
                found = coming.result()
                if following is not None:
                    coming = ahead.submit(self.rows, following)
                if later is not None:
                    self._table.announce(later.tolist())
                yield found
                done += len(ids)
                self._progress(stage, done, len(order))
