"""Ids to logits: reads the distinct records of a step and hands them to the runtime.

Owns what one generation owns: a cache of keys and values and the buffers records are read into.
Knows nothing of sampling or text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Ids, Logits
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.errors import Cancellation
from edge_memllm.process.forking import Workers
from edge_memllm.runtime_protocol import Runtime, StepLogits
from edge_memllm.table.source import Fetched, RecordSource

_NO_POSITION = np.empty((1, 0), np.int64)

# More is a little faster and takes memory in proportion.
PREFILL_CHUNKS = {"cpu": 128, "cuda": 1024}
# Between two steps of the replies under way, which a longer stretch of a prompt would hold up.
SERVING_CHUNK = 64


@dataclass(slots=True)
class StepCosts:
    """Sums over steps, filled in by whoever takes them: a `Feeder`, and the loop around it."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0  # reading, computing and choosing; not the reader of the text
    wait_seconds: float = 0.0  # of both, waiting for records
    draft_tokens: int = 0
    accepted_tokens: int = 0
    records_read: int = 0  # fetched, some perhaps from a record cache
    reads: int = 0
    bytes_read: int = 0  # of records that were not in the record cache
    kv_bytes: int = 0

    def note_records(self, count: int, fetched: Fetched) -> None:
        """Count records that were fetched."""
        self.records_read += count
        self.reads += fetched.reads
        self.bytes_read += fetched.bytes


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


class Feeder:
    """Feeds tokens to the sequences of one batch. Use it as a context manager: it owns memory."""

    def __init__(
        self,
        runtime: Runtime,
        table: RecordSource,
        batch: int,
        chunk: int,
        costs: StepCosts | None = None,
        cancellation: Cancellation | None = None,
        memory_gain: Sequence[float] | None = None,
    ) -> None:
        """Take the most tokens of one prefill step as `chunk`, and where to sum up the costs.

        `cancellation` is looked at before every step. `memory_gain` [L] replaces the gains of the
        model.
        """
        self.costs = StepCosts() if costs is None else costs
        self.cancellation = cancellation
        self.cache = runtime.new_cache(batch)
        self.fetched = Fetched(0, 0)  # for the last step
        self._runtime = runtime
        self._chunk = chunk
        self._reader = ChunkReader(table, self.costs)
        self.use(table, memory_gain)
        self._buffer = RecordBuffer(table.layout, batch)
        self._only_position = np.zeros((batch, 1), np.int64)

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, and end the thread that reads ahead; closing twice is fine."""
        try:
            self._reader.close()
        finally:
            self.cache.close()

    def serve(self, costs: StepCosts, cancellation: Cancellation | None) -> None:
        """Sum up the costs of the steps to come elsewhere, and look at another cancellation."""
        self.costs = self._reader.costs = costs
        self.cancellation = cancellation

    def use(self, table: RecordSource, memory_gain: Sequence[float] | None = None) -> None:
        """Compute the steps to come from another source, of the same layout, and other gains."""
        self._table = self._reader.table = table
        self._gain = None if memory_gain is None else np.array(memory_gain, np.float32)

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one) to a sequence; return the last one's logits [V].

        Valid until the next step, as in `score`, `decode` and `verify`.
        """
        start = perf_counter()
        before_last = len(tokens) - self._chunk
        with closing(self._reader.chunks(tokens, self._chunk)) as chunks:
            for number, chunk in enumerate(chunks):
                last = number * self._chunk >= before_last
                wanted = np.array([[chunk.index.size - 1]]) if last else _NO_POSITION
                logits = self._append(sequence, chunk, wanted)
        self.costs.prefill_tokens += len(tokens)
        self.costs.prefill_seconds += perf_counter() - start
        only: Logits = logits[0]
        return only

    def skip(self, sequence: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence without computing logits."""
        with closing(self._reader.chunks(tokens, self._chunk)) as chunks:
            for chunk in chunks:
                self._append(sequence, chunk, _NO_POSITION)

    def rewind(self, sequence: int, tokens: Sequence[int]) -> None:
        """Let a sequence hold only these tokens, which are the first of those it holds.

        Where the cache no longer has what they end on, they are computed again.
        """
        kept = self.cache.rewindable(sequence, len(tokens))
        self.cache.truncate(sequence, kept)
        self.skip(sequence, tokens[kept:])

    def score(self, sequence: int, tokens: Sequence[int]) -> Logits:
        """Append at most one chunk of tokens; return the logits [T, V] of every position."""
        chunk = self._reader.read(tokens)
        return self._append(sequence, chunk, np.arange(len(tokens)).reshape(1, -1))

    def decode(self, tokens: Sequence[int], sequences: range | None = None) -> StepLogits:
        """Append one token to each sequence; return logits [B, V], valid until the next step.

        With `sequences`, only those grow and B is their number. Logits are in the runtime's own
        dtype, float32 or float16, as in `verify`.
        """
        shape = (len(tokens), 1)
        return self._step(tokens, shape, self._only_position[: len(tokens)], sequences)[:, 0]

    def verify(self, tokens: Sequence[int], sequence: int = 0) -> StepLogits:
        """Append tokens to one sequence; return the logits [T, V] of every position.

        Their records are read in one batch. `cache.truncate` takes back what was fed in vain, if
        it was no more than is `revocable`.
        """
        alone = None if self.cache.batch == 1 else range(sequence, sequence + 1)
        if len(tokens) == 1:
            return self.decode(tokens, alone)
        every = np.arange(len(tokens)).reshape(1, -1)
        only = None if alone is None else sequence
        logits: StepLogits = self._step(tokens, (1, len(tokens)), every, only)[0]
        return logits

    def announce(self, tokens: Iterable[int]) -> None:
        """Say that these tokens will be fed next, so that storage can begin with their records."""
        self._table.announce(tokens)

    def _append(self, sequence: int, chunk: Chunk, wanted: NDArray[np.int64]) -> Logits:
        """Append one chunk to a sequence; return float32 logits [K, V] of some positions."""
        self._check_cancelled()
        logits = self._runtime.step(
            chunk.buffer,
            chunk.distinct,
            chunk.index,
            self.cache,
            wanted,
            sequence=sequence,
            memory_gain=self._gain,
        )
        self.costs.kv_bytes = self.cache.nbytes
        self.fetched = chunk.fetched
        chosen: Logits = logits[0].astype(np.float32, copy=False)
        return chosen

    def _step(
        self,
        tokens: Sequence[int],
        shape: tuple[int, int],
        wanted: NDArray[np.int64],
        sequences: range | int | None = None,
    ) -> StepLogits:
        """Append tokens in `shape` [B, T] to all sequences, some or one; return [B, K, V]."""
        self._check_cancelled()
        self._reader.drop_buffers()  # decoding needs less
        distinct, index = number_distinct(tokens)
        if self._buffer.capacity < len(distinct):
            self._buffer = RecordBuffer(self._table.layout, len(distinct))
        start = perf_counter()
        self.fetched = self._table.fetch(distinct, self._buffer)
        self.costs.wait_seconds += perf_counter() - start
        self.costs.note_records(len(distinct), self.fetched)
        logits = self._runtime.step(
            self._buffer,
            len(distinct),
            index.reshape(shape),
            self.cache,
            wanted,
            sequence=sequences,
            memory_gain=self._gain,
        )
        self.costs.kv_bytes = self.cache.nbytes
        return logits

    def _check_cancelled(self) -> None:
        if self.cancellation is not None:
            self.cancellation.check()
