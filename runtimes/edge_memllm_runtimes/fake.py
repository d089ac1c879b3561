"""A runtime without a network: logits are a hash of the records of all tokens so far.

Deterministic and fast, so the generation loop can be tested and timed by itself. Like a real
runtime it sees only records, and the same text gives the same logits however it is cut into
steps; another token, order or gain gives others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.runtime_protocol import KVCache, KVState, KVStateLayout
from edge_memllm_runtimes.kv_cache import GrowingCache, Mark, RollingWindow, check_step, own_cache

_MIX = np.uint64(0xBF58476D1CE4E5B9)
_STATE_BYTES = 8
_LOST = 0  # which is the hash of nothing


class FakeCache(GrowingCache):
    """One hash per position stands for its keys and values.

    With a `window`, of two positions or more, those are lost that a rolling cache of so many rows
    would no longer have; and what is computed where one of a window is lost is something else.
    """

    def __init__(self, batch: int, context: int, window: int | None = None, rows: int = 0) -> None:
        windows = () if window is None else (RollingWindow(window, rows, batch),)
        super().__init__(batch, context, windows=windows)
        self.states: list[list[int]] = [[] for _ in range(batch)]

    @property
    def nbytes(self) -> int:
        """Bytes that the positions would take."""
        return self.batch * self.capacity * _STATE_BYTES

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from `length` on."""
        super().truncate(sequence, length)
        del self.states[sequence][length:]

    def _grow(self, capacity: int) -> None:
        """Lists grow by themselves."""

    def _copy(self, sequence: int, source: int, length: int, mark: Mark | None) -> None:
        states = self.states[source][:length]
        if mark is not None:
            (first,) = mark.first
            states[first:] = mark.rows["states"][: length - first].tolist()
        self.states[sequence] = states

    def _window_rows(self, sequence: int, first: tuple[int, ...]) -> KVState:
        return {"states": np.array(self.states[sequence][first[0] :], np.uint64)}

    def _swap(self, first: int, second: int) -> None:
        states = self.states
        states[first], states[second] = states[second], states[first]

    def append(self, sequence: int, records: Iterable[int]) -> None:
        """Append a position for each record."""
        states = self.states[sequence]
        looked_at = states[self._first_saved(len(states)) :]
        state = _LOST if _LOST in looked_at or not states else states[-1]
        for record in records:
            state = _chain(state, record)
            states.append(state)

    def lose(self) -> None:
        """Forget what a rolling cache no longer has."""
        for window in self.windows:
            for sequence, states in enumerate(self.states):
                lost = window.lowest(sequence, len(states))
                states[:lost] = [_LOST] * lost

    def state_layout(self, length: int) -> KVStateLayout:
        """Return the hashes, [T], or those that are looked at next."""
        return {"states": (np.dtype(np.uint64), (length - self._first_saved(length),))}

    def _state(self, sequence: int, length: int) -> KVState:
        return {"states": np.array(self.states[sequence][self._first_saved(length) :], np.uint64)}

    def _load_state(self, sequence: int, length: int, state: KVState) -> None:
        self.states[sequence] = [_LOST] * self._first_saved(length) + state["states"].tolist()

    def _first_saved(self, length: int) -> int:
        return max((window.looked_at(length) for window in self.windows), default=0)

    def _free(self) -> None:
        self.states.clear()


class FakeRuntime:
    """See the module docstring; `device` is `cpu`."""

    name = "fake"
    device = "cpu"

    def __init__(
        self, vocab_size: int, context: int = 512, *, window: int | None = None, rows: int = 0
    ) -> None:
        """Take the sizes of a model; `window` and `rows` as in `FakeCache`."""
        self._context = context
        self._rolling = window, rows
        self._steps = np.arange(vocab_size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def new_cache(self, batch: int) -> FakeCache:
        """Return an empty cache."""
        return FakeCache(batch, self._context, *self._rolling)

    def step(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        cache: KVCache,
        logits_index: NDArray[np.int64] | None,
        *,
        sequence: int | range | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Append tokens and return logits; see `edge_memllm.runtime_protocol.Runtime`."""
        cache = own_cache(cache, FakeCache)
        batch, tokens = token_index.shape
        wanted = np.empty((batch, 0), np.int64) if logits_index is None else logits_index
        check_step(token_index, distinct, cache, wanted, sequence)
        active = cache.active(sequence)
        cache.ensure(int(cache.lengths[active].max()) + tokens)
        gain = b"" if memory_gain is None else memory_gain.tobytes()
        # In the order of a record: scales stand in front of codes.
        fed = [buffer.embedding(distinct), *reversed(buffer.wire(distinct).values())]
        records = [_digest([each[slot] for each in fed], gain) for slot in range(distinct)]
        for number, row in zip(range(cache.batch)[active], token_index.tolist(), strict=True):
            cache.append(number, [records[index] for index in row])
        logits = self._logits(cache.states[active], tokens, wanted)
        cache.lengths[active] += tokens
        cache.lose()
        return logits

    def close(self) -> None:
        """Nothing is held."""

    def logits(self, state: int) -> NDArray[np.float32]:
        """Return the logits [V] that follow a state: even between -8 and 8."""
        mixed = self._steps + np.uint64(state)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX
        return ((mixed >> np.uint64(40)).astype(np.float32) * 2.0**-20 - 8).astype(np.float32)

    def _logits(
        self, histories: list[list[int]], tokens: int, wanted: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        logits = np.empty((*wanted.shape, len(self._steps)), np.float32)
        for states, positions, out in zip(histories, wanted.tolist(), logits, strict=True):
            for place, position in enumerate(positions):
                out[place] = self.logits(states[len(states) - tokens + position])
        return logits


def _digest(parts: Iterable[NDArray[Any]], gain: bytes) -> int:
    return xxh3_64_intdigest(b"".join((*(part.tobytes() for part in parts), gain)))


def _chain(state: int, record: int) -> int:
    return xxh3_64_intdigest(state.to_bytes(8, "little") + record.to_bytes(8, "little"))
