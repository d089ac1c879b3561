"""What every cache of keys and values does: count valid positions, grow in steps, keep a limit.

Memory grows with the text, never to the whole context up front; of layers that look at a window, a
rolling cache has room for little more than that and never grows. Knows no library; where the values
lie is the business of the runtime that derives from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.process.memory_account import ByteBudget, MemoryShare
from edge_memllm.runtime_protocol import KVCache, KVState, KVStateLayout

if TYPE_CHECKING:
    from edge_memllm.artifact.model_spec import CacheSpec

FIRST_CAPACITY = 256
# Rows of a rolling cache beyond its window: they move once in so many steps, not in each. More
# costs attention, which works on all rows: at a window of 512, 16 to 64 were the quickest, none
# 5 % slower, and as many as the window 20 %.
ROLLING_SLACK = 64
# Windows that are kept of a text beside its own: where it parts from others, where a prompt ends.
MOST_MARKS = 2

Cache = TypeVar("Cache", bound=KVCache)


def cache_names(cache: CacheSpec) -> tuple[str, str]:
    """Return the names of a layer's keys and values, without the word for past or present."""
    return f"{cache.layer}.key", f"{cache.layer}.value"


def reader_names(cache: CacheSpec) -> list[str]:
    """Return the same of the layers that read another's, keys and values in turn."""
    return [f"{layer}.{part}" for layer in cache.readers for part in ("key", "value")]


def grown_capacity(needed: int, context: int) -> int:
    """Return the room made for `needed` positions: 256, 512, 768, 1024, 1536, 2048, 3072, ...

    At most a third of it is unused then, for a few copies more than doubling would take; on a
    CPU, too, the unused part becomes resident where the system uses huge pages. At most `context`.
    """
    below = 1 << max(0, needed - 1).bit_length() >> 1  # the power of two under `needed`
    step = max(FIRST_CAPACITY, below // 2)
    return min(-(-needed // step) * step, context)


def rolling_capacity(window: int, context: int, slack: int = ROLLING_SLACK) -> int:
    """Return how many rows a rolling cache has, whatever the length of the text."""
    return max(window, min(window + slack, context))


class RollingWindow:
    """Which positions the rolling caches of one window hold, for each sequence of a batch.

    Of T positions the rows [0, L) hold the last L, in order. L follows from T and the rows there
    are, as GroupQueryAttention defines it: rows move by `capacity - window + 1` when they are full.
    """

    def __init__(self, window: int, capacity: int, batch: int) -> None:
        self.window = window
        self.capacity = capacity
        self.first = np.zeros(batch, np.int64)  # rows of positions before it hold nothing

    def moved(self, length: int) -> int:
        """Return which position the row 0 is of, in a sequence of `length`."""
        step = self.capacity - self.window + 1
        return step * -(-max(0, length - self.capacity) // step)

    def room(self, length: int) -> int:
        """Return how many positions can be appended before rows move."""
        return self.capacity + self.moved(length) - length

    def lowest(self, sequence: int, length: int) -> int:
        """Return the first position that is held of a sequence of `length`."""
        return max(int(self.first[sequence]), self.moved(length))

    def looked_at(self, length: int) -> int:
        """Return the first position that what follows the first `length` still looks at."""
        return max(0, length - self.window + 1)

    def rows(self, length: int, first: int, last: int) -> slice:
        """Return the rows of positions from `first` to before `last`, in a sequence of `length`."""
        moved = self.moved(length)
        return slice(first - moved, last - moved)


@dataclass(frozen=True, slots=True)
class Mark:
    """The windows of a sequence as they were at some length, rows [..., first to length]."""

    length: int
    first: tuple[int, ...]  # position of the first row, of each `RollingWindow`
    rows: KVState

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(rows.nbytes for rows in self.rows.values())


class KVBudget(ByteBudget):
    """Bytes that the texts of all generations under way may take together.

    `score_bytes` is what attention works on per position, whatever the number of sequences.
    """

    def __init__(self, limit: int, score_bytes: int = 0) -> None:
        super().__init__(limit)
        self.score_bytes = score_bytes


class GrowingCache(ABC):
    """Lengths and capacity of a batch; see `edge_memllm.runtime_protocol.KVCache`."""

    def __init__(
        self,
        batch: int,
        context: int,
        *,
        position_bytes: int = 0,
        window_bytes: int = 0,
        windows: Iterable[RollingWindow] = (),
        budget: KVBudget | MemoryShare | None = None,
    ) -> None:
        """Take the bytes of one sequence, and what all caches share.

        They are those of each position, and those of rolling caches, which have `windows`.
        """
        self.batch = batch
        self.context = context
        self.capacity = 0
        self.lengths = np.zeros(batch, np.int32)
        self.closed = False
        self.copies = True
        self.windows = tuple(windows)
        self._window_bytes = batch * window_bytes
        self._column_bytes = batch * position_bytes + (budget.score_bytes if budget else 0)
        self._budget = budget
        self._held_bytes = 0
        self._marks: list[dict[int, Mark]] = [{} for _ in range(batch)]
        self._mark_bytes = 0  # of all of them: asked for in each step

    @property
    def marks(self) -> bool:
        """Whether `mark` keeps anything: some layers keep a window only."""
        return bool(self.windows) and self.copies

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by keys and values."""

    @abstractmethod
    def _grow(self, capacity: int) -> None:
        """Make room for exactly `capacity` positions, keeping what is there."""

    @abstractmethod
    def _copy(self, sequence: int, source: int, length: int, mark: Mark | None) -> None:
        """Write the first `length` positions of `source`, one or more, into a sequence.

        Windows are those of `mark`, if there is one. The sequence may be `source` itself, whose
        rows are to lie otherwise.
        """

    def _window_rows(self, sequence: int, first: tuple[int, ...]) -> KVState:
        """Return copies of what rolling caches hold from positions on, one for each window."""
        raise NotImplementedError

    @abstractmethod
    def _swap(self, first: int, second: int) -> None:
        """Exchange what two sequences hold; `lengths` are still the old ones."""

    @abstractmethod
    def state_layout(self, length: int) -> KVStateLayout:
        """Return what `state` gives for a sequence of `length` positions: dtypes and shapes."""

    @abstractmethod
    def _state(self, sequence: int, length: int) -> KVState:
        """Return what a sequence holds at its first `length` positions, which are all of it."""

    @abstractmethod
    def _load_state(self, sequence: int, length: int, state: KVState) -> None:
        """Write `length` positions that `state` gave; `lengths` is still the old one."""

    @abstractmethod
    def _free(self) -> None:
        """Free the memory."""

    def close(self) -> None:
        """Free the memory; the cache cannot be used any more."""
        self._free()
        for sequence in range(self.batch):
            self._drop_marks(sequence, 0)
        if self._budget is not None:
            self._budget.exchange(self._held_bytes, 0)
        self._held_bytes = self.capacity = 0
        self.closed = True

    def ensure(self, capacity: int) -> None:
        """Make room for at least `capacity` positions."""
        if self.closed:
            raise ValueError("the cache is closed, expected an open one from new_cache.")
        if capacity <= self.capacity:
            return
        if capacity > self.context:
            raise RequestError(
                f"{capacity} positions are needed and the model's context has {self.context}. "
                "Shorten the prompt or ask for fewer tokens."
            )
        grown = self._reserved(capacity, grown_capacity(capacity, self.context))
        try:
            self._grow(grown)
        except MemoryError as error:
            self.close()  # some of it may be gone
            raise EdgeMemLLMError(
                f"There is no memory for keys and values of {self.batch} x {grown} positions "
                f"({error}). Use a shorter text or fewer prompts at once."
            ) from error
        self.capacity = grown

    def rewindable(self, sequence: int, length: int) -> int:
        """Return the most positions, at most `length`, that a sequence can be cut to."""
        if self._has(sequence, length):
            return length
        marks = self._marks[sequence].values()
        covered = (min(length, mark.length) for mark in marks if self._covers(mark, length))
        return max(covered, default=0)

    def mark(self, sequence: int) -> None:
        """Let the present length stay `rewindable`, and one position before it, if there is room.

        The last `MOST_MARKS` of them are kept, for as long as the text goes on from there.
        """
        length, marks = int(self.lengths[sequence]), self._marks[sequence]
        if not (length and self.marks):
            return
        if (mark := marks.pop(length, None)) is None:
            first = tuple(
                max(window.lowest(sequence, length), length - window.window)
                for window in self.windows
            )
            mark = Mark(length, first, self._window_rows(sequence, first))
            if self._budget is not None and self._budget.exchange(0, mark.nbytes) is not None:
                return
            self._mark_bytes += mark.nbytes
        marks[length] = mark
        if len(marks) > MOST_MARKS:
            self._drop_mark(sequence, next(iter(marks)))

    def revocable(self, sequence: int) -> int:
        """Return how many positions can be appended so that each of them can be taken back."""
        length = int(self.lengths[sequence])
        return min(
            [self.context - length, *(window.room(length) for window in self.windows)],
        )

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from `length` on."""
        self._check_held(sequence, length)
        held, mark = int(self.lengths[sequence]), self._mark_for(sequence, length)
        moved = any(each.moved(length) != each.moved(held) for each in self.windows)
        if length and (moved or mark is not None):
            self._copy(sequence, sequence, length, mark)
        self._hold(sequence, sequence, length, mark)
        self._drop_marks(sequence, length)

    def copy(self, sequence: int, source: int, length: int) -> None:
        """Let `sequence` hold the first `length` positions of `source` and nothing else."""
        self._check_held(source, length)
        self._require_copies()
        if sequence == source or not length:
            self.truncate(sequence, length)
            return
        mark = self._mark_for(source, length)
        self._drop_marks(sequence, 0)
        self._copy(sequence, source, length, mark)
        self._hold(sequence, source, length, mark)

    def swap(self, first: int, second: int) -> None:
        """Exchange the places of two sequences."""
        self._require_copies()
        if first != second:
            self._swap(first, second)
            self.lengths[[first, second]] = self.lengths[[second, first]]
            for window in self.windows:
                window.first[[first, second]] = window.first[[second, first]]
            marks = self._marks
            marks[first], marks[second] = marks[second], marks[first]

    def state(self, sequence: int) -> KVState:
        """Return the keys and values of one sequence, exactly; read them before the next step."""
        return self._state(sequence, int(self.lengths[sequence]))

    def load_state(self, sequence: int, length: int, state: KVState) -> None:
        """Let a sequence hold `length` positions that `state` gave."""
        found = {name: (array.dtype, array.shape) for name, array in state.items()}
        if found != self.state_layout(length):
            raise ValueError(
                f"{length} positions of another cache, expected {self.state_layout(length)}"
            )
        self.ensure(length)
        self.truncate(sequence, 0)
        if length:
            self._load_state(sequence, length, state)
        for window in self.windows:
            window.first[sequence] = window.looked_at(length)
        self.lengths[sequence] = length

    def active(self, sequence: int | range | None) -> slice:
        """Return the sequences that a step advances: one, neighbours, or all."""
        if sequence is None:
            return slice(None)
        if isinstance(sequence, range):
            return slice(sequence.start, sequence.stop)
        return slice(sequence, sequence + 1)

    def moves(self, sequence: int | range | None, tokens: int) -> bool:
        """Return whether rows of rolling caches move when so many tokens are appended."""
        lengths = self.lengths[self.active(sequence)].tolist()
        return any(window.room(length) < tokens for window in self.windows for length in lengths)

    def _check_held(self, sequence: int, length: int) -> None:
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"length is {length}, expected 0 to {self.lengths[sequence]}.")
        if self.rewindable(sequence, length) != length:
            raise ValueError(
                f"length is {length} of {self.lengths[sequence]}, whose window is no longer kept: "
                f"expected {self.rewindable(sequence, length)}, which `rewindable` tells."
            )

    def _has(self, sequence: int, length: int) -> bool:
        """Whether the caches themselves have what the first positions end on."""
        held = int(self.lengths[sequence])
        return length in (0, held) or all(
            window.lowest(sequence, held) <= window.looked_at(length)
            and (self.copies or window.moved(length) == window.moved(held))
            for window in self.windows
        )

    def _covers(self, mark: Mark, length: int) -> bool:
        """Whether a mark, or what it has of one position less, is at most `length` long."""
        before = zip(self.windows, mark.first, strict=True)
        return mark.length <= length or (
            mark.length == length + 1
            and all(first <= window.looked_at(length) for window, first in before)
        )

    def _mark_for(self, sequence: int, length: int) -> Mark | None:
        """Return the mark to take the windows from; None where the caches have them."""
        if self._has(sequence, length):
            return None
        marks = self._marks[sequence]
        return marks[length] if length in marks else marks[length + 1]

    def _drop_marks(self, sequence: int, length: int) -> None:
        """Forget the marks of a sequence behind a length."""
        for behind in [each for each in self._marks[sequence] if each > length]:
            self._drop_mark(sequence, behind)

    def _drop_mark(self, sequence: int, length: int) -> None:
        mark = self._marks[sequence].pop(length)
        self._mark_bytes -= mark.nbytes
        if self._budget is not None:
            self._budget.exchange(mark.nbytes, 0)

    def _hold(self, sequence: int, source: int, length: int, mark: Mark | None) -> None:
        """Note that a sequence holds the first positions of `source`, as far as that has them."""
        held = int(self.lengths[source])
        for number, window in enumerate(self.windows):
            first = window.lowest(source, held) if mark is None else mark.first[number]
            window.first[sequence] = first if length else 0
        self.lengths[sequence] = length

    def _require_copies(self) -> None:
        if not self.copies:
            raise ValueError("this cache cannot move what it holds: its `copies` is False.")

    def _reserved(self, needed: int, wanted: int) -> int:
        """Hold room for `wanted` positions, or as many as fit, if those are enough.

        Raises `RequestError` naming the positions that fit.
        """
        if self._budget is None:
            return wanted
        room = 0
        for capacity in (wanted, needed):
            size = self._window_bytes + capacity * self._column_bytes
            left = self._budget.exchange(self._held_bytes, size)
            if left is None:
                self._held_bytes = size
                return capacity
            room = left
        sequences = f"{self.batch} sequences" if self.batch > 1 else "one sequence"
        fit = max(0, room - self._window_bytes) // max(1, self._column_bytes)
        windows = f", windows of layers {self._window_bytes:,}" if self.windows else ""
        raise RequestError(
            f"{needed} positions of {sequences} are needed, {fit} fit: a "
            f"position takes {self._column_bytes:,} bytes of keys, values and attention{windows}, "
            f"and of the {self._budget.limit:,} bytes that the memory limit leaves for them "
            f"{room:,} are free. Shorten the text, ask for fewer tokens, or raise the limit."
        )


def own_cache(cache: KVCache, kind: type[Cache]) -> Cache:
    """Return `cache` as the kind a runtime makes; raises `TypeError` if another made it."""
    if not isinstance(cache, kind):
        raise TypeError(f"a {type(cache).__name__} was given, expected the runtime's own cache.")
    return cache


def check_step(
    token_index: NDArray[np.int64],
    distinct: int,
    cache: KVCache,
    logits_index: NDArray[np.int64],
    sequence: int | range | None,
) -> None:
    """Raise `ValueError` for arrays that do not fit together, before anything is computed."""
    batch, tokens = token_index.shape
    if sequence is None:
        fits = batch == cache.batch and (tokens == 1 or batch == 1)
    elif isinstance(sequence, range):
        inside = 0 <= sequence.start < sequence.stop <= cache.batch and sequence.step == 1
        fits = inside and batch == len(sequence) and tokens == 1
    else:
        fits = batch == 1 and 0 <= sequence < cache.batch
    if not fits or tokens < 1:
        raise ValueError(
            f"token_index {token_index.shape} does not fit a cache of {cache.batch} sequences: "
            "expected [B, 1], or [1, T] with one sequence of them."
        )
    if logits_index.shape[0] != batch:
        raise ValueError(f"logits_index {logits_index.shape}, expected [{batch}, K].")
    _check_range("token_index", token_index, distinct)
    _check_wanted(logits_index, tokens)


def _check_wanted(index: NDArray[np.int64], tokens: int) -> None:
    """Layers that keep nothing compute wanted positions alone and count them from the end."""
    wanted = index.shape[1]
    if index.size == 1:  # every decode step
        last = index.item() == tokens - 1
    else:
        last = bool((index == np.arange(tokens - wanted, tokens)).all())
    if wanted > tokens or not last:
        raise ValueError(
            f"logits_index {index.tolist()!s:.80}, expected the last K of {tokens} positions in "
            "order."
        )


def _check_range(name: str, index: NDArray[np.int64], limit: int) -> None:
    # ONNX Runtime takes -1 for the last entry without a word.
    if index.size == 1:  # every decode step: a plain number is compared ten times as fast
        low = high = index.item()
    elif index.size:
        low, high = index.min(), index.max()
    else:
        return
    if low < 0 or high >= limit:
        raise ValueError(f"{name} goes from {low} to {high}, expected 0 to {limit - 1}.")
