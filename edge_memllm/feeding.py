"""Ids to logits: reads the distinct records of a step and hands them to the runtime.

Owns what one generation owns: a cache of keys and values and the buffers records are read into.
Knows nothing of sampling or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from edge_memllm.records import RecordBuffer
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.statistics import StepCosts
from edge_memllm.table import Table

Logits = NDArray[np.float32]


class Feeder:
    """Feeds tokens to the sequences of one batch. Use it as a context manager: it owns memory."""

    def __init__(
        self,
        runtime: Runtime,
        table: Table,
        batch: int,
        chunk: int,
        costs: StepCosts | None = None,
    ) -> None:
        """Take the most tokens of one prefill step as `chunk`, and where to sum up the costs."""
        self.costs = StepCosts() if costs is None else costs
        self.cache = runtime.new_cache(batch)
        self._runtime = runtime
        self._table = table
        self._chunk = chunk
        self._buffer = RecordBuffer(table.layout, batch)
        self._wide_buffer: RecordBuffer | None = None
        self._ids = np.zeros(batch, np.int64)
        self._each_own_slot = np.arange(batch, dtype=np.int64).reshape(batch, 1)
        self._only_position = np.zeros((batch, 1), np.int64)

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one) to a sequence; return the last one's logits [V].

        Valid until the next step, as in `score` and `decode`.
        """
        start = perf_counter()
        last_chunk = (len(tokens) - 1) // self._chunk * self._chunk
        self.skip(sequence, tokens[:last_chunk])
        rest = np.asarray(tokens[last_chunk:], np.int64)
        logits = self._append(sequence, rest, np.array([len(rest) - 1], np.int64))
        self.costs.prefill_tokens += len(tokens)
        self.costs.prefill_seconds += perf_counter() - start
        last: Logits = logits[0]
        return last

    def skip(self, sequence: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence without computing logits."""
        for begin in range(0, len(tokens), self._chunk):
            chunk = np.asarray(tokens[begin : begin + self._chunk], np.int64)
            self._append(sequence, chunk, np.empty(0, np.int64))

    def score(self, sequence: int, tokens: Sequence[int]) -> Logits:
        """Append at most one chunk of tokens; return the logits [T, V] of every position."""
        ids = np.asarray(tokens, np.int64)
        return self._append(sequence, ids, np.arange(len(ids)))

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each sequence; return logits [B, V], valid until the next step."""
        self._wide_buffer = None
        ids = self._ids
        ids[:] = tokens
        if len(ids) == 1:
            distinct, index = ids, self._each_own_slot
        else:
            distinct, inverse = np.unique(ids, return_inverse=True)
            index = inverse.reshape(-1, 1)
        self._fetch(distinct, self._buffer)
        logits = self._runtime.step(
            self._buffer, len(distinct), index, self.cache, self._only_position
        )
        self.costs.kv_bytes = self.cache.nbytes
        return logits[:, 0]

    def _append(
        self, sequence: int, ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Logits:
        """Append one chunk [T] to a sequence; return logits [K, V] of some of its positions."""
        distinct, index = np.unique(ids, return_inverse=True)
        buffer = self._room_for(len(distinct))
        self._fetch(distinct, buffer)
        logits = self._runtime.step(
            buffer,
            len(distinct),
            index.reshape(1, -1),
            self.cache,
            positions.reshape(1, -1),
            sequence=sequence,
        )
        self.costs.kv_bytes = self.cache.nbytes
        chosen: Logits = logits[0]
        return chosen

    def _fetch(self, distinct: NDArray[np.int64], buffer: RecordBuffer) -> None:
        self.costs.reads += self._table.fetch(distinct, buffer)
        self.costs.records_read += len(distinct)

    def _room_for(self, records: int) -> RecordBuffer:
        """Return a buffer for a chunk's records; it is kept until decoding, which needs less."""
        if self._wide_buffer is None or self._wide_buffer.capacity < records:
            self._wide_buffer = RecordBuffer(self._table.layout, records)
        return self._wide_buffer
