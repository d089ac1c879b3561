"""Who gives the records of tokens, and who gives their rows: the two seams above a table.

Whoever feeds a runtime takes records as they are fed, from a `RecordSource`: a table, or something
over one. Whoever works with the numbers takes `Rows`: every record source gives them by decoding,
a network by computing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from edge_memllm.arrays import Bytes, Floats, Ids
from edge_memllm.artifact.layout import RecordBuffer, TableLayout
from edge_memllm.progress import Counted

# Decoded rows of a chunk. Freed blocks below 32 MB are used again, larger ones go back to the
# system and are zeroed anew each time, which costs a fifth of the run.
_CHUNK_BYTES = 16 << 20
_AHEAD = 2  # chunks


class Rows(Protocol):
    """Gives the embeddings and the memory rows of a model's tokens, without gains, as float32.

    U distinct tokens, M rows each, of width D.
    """

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [U, D] of tokens `ids` [U]."""

    def rows(self, ids: Ids) -> Floats:
        """Return the memory rows [U, M, D] of tokens `ids` [U]."""

    def chunks(self, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and rows [N, M, D] of tokens, in this order, N at a time."""


class Fetched(NamedTuple):
    """What one fetch took."""

    reads: int  # of storage, as the system was asked for them
    bytes: int  # of the records that were not in the record cache
    stored: Sequence[int] = ()  # the tokens of those records


class RecordSource(ABC):
    """Gives records by token id, and so `Rows`. Thread-safe, if each thread has its own buffer."""

    layout: TableLayout  # of the records that are given
    reader_name: str  # of what brings them from storage

    @abstractmethod
    def fetch(self, ids: Ids, buffer: RecordBuffer) -> Fetched:
        """Put the record of `ids[i]`, as the graph is fed it, into slot i of `buffer`.

        `ids` is [U], distinct. Raises `RequestError` for an id that is not in the vocabulary or
        more ids than the buffer holds, and what reading raises; the buffer's content is then
        undefined.
        """

    @abstractmethod
    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon. A hint: it returns at once."""

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D]. Raises as `fetch`."""
        return self._fetched(ids).embedding(len(ids)).astype(np.float32)

    def stored_embeddings(self, ids: Ids) -> Bytes:
        """Return the embeddings of `ids` [U] as their records hold them. Raises as `fetch`."""
        return self._fetched(ids).stored_embedding(len(ids))

    def rows(self, ids: Ids) -> Floats:
        """Return the decoded memory rows of `ids` [U] as float32 [U, M, D]. Raises as `fetch`."""
        return self._fetched(ids).rows(len(ids))

    def chunks(self, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and rows [N, M, D] of tokens, in this order.

        Chunks are read and decoded ahead of their receiver, one of them while storage is read for
        another.
        """
        count = chunk_size(self.layout)
        chunks = [order[start : start + count] for start in range(0, len(order), count)]
        with ThreadPoolExecutor(_AHEAD) as ahead:
            coming = deque(ahead.submit(self._decoded, ids) for ids in chunks[:_AHEAD])
            for number in range(len(chunks)):
                found = coming.popleft().result()
                if number + _AHEAD < len(chunks):
                    coming.append(ahead.submit(self._decoded, chunks[number + _AHEAD]))
                yield found

    def _decoded(self, ids: Ids) -> tuple[Floats, Floats]:
        buffer = self._fetched(ids)
        return buffer.embedding(len(ids)).astype(np.float32), buffer.rows(len(ids))

    def _fetched(self, ids: Ids) -> RecordBuffer:
        buffer = RecordBuffer(self.layout, len(ids))
        self.fetch(ids, buffer)
        return buffer


def chunk_size(layout: TableLayout) -> int:
    """Return how many tokens' rows, decoded, are a chunk of 16 MiB; at least one."""
    return max(1, _CHUNK_BYTES // (4 * max(1, layout.layers * layout.width)))


def counted(
    chunks: Iterable[tuple[Floats, Floats]], total: int, progress: Counted
) -> Iterator[tuple[Floats, Floats]]:
    """Yield the chunks of `total` tokens and tell `progress` of each once it has been used."""
    done = 0
    for embedding, rows in chunks:
        yield embedding, rows
        done += len(embedding)
        progress(done, total)
