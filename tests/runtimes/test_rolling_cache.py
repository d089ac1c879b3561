"""Layers that look at a window keep little more than that, and compute what they always did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.table import Table
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.fake import FakeRuntime
from edge_memllm_runtimes.kv_cache import MOST_MARKS, KVBudget, RollingWindow
from edge_memllm_runtimes.options import RuntimeOptions
from support.rolling import CONTEXT, ROWS, WINDOW, export_rolling

STEP = ROWS - WINDOW + 1
TEXT = np.random.default_rng(0).integers(0, 250, 330).tolist()
TEXTS = np.random.default_rng(1).integers(0, 250, (3, 330)).tolist()
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"graph_weights": "fp32"},
    "int8 kv": {"graph_weights": "fp16", "kv_dtype": "int8"},
}
# Of logits: what rounding makes of another order of sums, of float16 and of codes.
BOUNDS = {"fp32": 1e-4, "int8 kv": 6e-2}


@dataclass(frozen=True)
class Pair:
    """One network twice: with rolling caches, and with caches that keep every position."""

    rolling: Runtime
    whole: Runtime
    table: Table
    bound: float

    def feeder(self, batch: int = 1, chunk: int = 40) -> Feeder:
        return Feeder(self.rolling, self.table, batch, chunk)

    @cached_property
    def expected(self) -> Callable[[tuple[int, ...]], np.ndarray]:
        """Logits [V] behind a text, computed from its beginning with every position kept."""

        @lru_cache(4096)
        def logits(text: tuple[int, ...]) -> np.ndarray:
            with Feeder(self.whole, self.table, 1, 64) as feeder:
                return feeder.prefill(0, text).copy()

        return logits

    def check(self, found: np.ndarray, text: list[int]) -> None:
        np.testing.assert_allclose(found, self.expected(tuple(text)), atol=self.bound)


@pytest.fixture(scope="module", params=FORMS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("rolling")
    with ExitStack() as opened:
        artifacts = [
            opened.enter_context(Artifact.open(path))
            for path in export_rolling(folder, **FORMS[request.param])
        ]
        assert [each.rolling for each in artifacts[0].manifest.model.caches] == [True, False, True]
        runtimes = [
            opened.enter_context(closing(open_runtime(each, "cpu", RuntimeOptions(threads=1))))
            for each in artifacts
        ]
        table = opened.enter_context(closing(Table.open(artifacts[0], "ram")))
        yield Pair(*runtimes, table, BOUNDS[request.param])


# What is kept


def test_rows_move_when_they_are_full_and_a_window_always_stays() -> None:
    for window, capacity in ((1, 1), (1, 5), (8, 8), (8, 9), (8, 30)):
        rolling = RollingWindow(window, capacity, 1)
        step, moved = capacity - window + 1, 0
        for length in range(1, 200):
            while length - moved > capacity:
                moved += step
            assert rolling.moved(length) == moved
            assert min(length, window) <= length - moved <= min(length, capacity)
            assert rolling.room(length) == capacity - (length - moved)


def test_memory_does_not_grow_with_the_text_where_a_window_is_kept(pair: Pair) -> None:
    with pair.feeder() as rolling, Feeder(pair.whole, pair.table, 1, 40) as whole:
        sizes = []
        for feeder in (rolling, whole):
            feeder.skip(0, TEXT[:10])
            first = feeder.cache.nbytes
            feeder.skip(0, TEXT[10:])
            sizes.append((first, feeder.cache.nbytes))
    position = sizes[1][1] // 3 // CONTEXT  # of one of three layers that are alike
    assert sizes[1] == (3 * 256 * position, 3 * CONTEXT * position)
    assert sizes[0] == ((256 + 2 * ROWS) * position, (CONTEXT + 2 * ROWS) * position)


# Parity with caches that keep every position


@pytest.mark.parametrize("chunk", [330, 100, 33, 1])
def test_texts_of_many_windows(chunk: int, pair: Pair) -> None:
    with pair.feeder() as feeder:
        found = [
            np.array(feeder.score(0, TEXT[begin : begin + chunk]))
            for begin in range(0, len(TEXT), chunk)
        ]
    with Feeder(pair.whole, pair.table, 1, 64) as whole:
        parts = [np.array(whole.score(0, TEXT[at : at + 64])) for at in range(0, len(TEXT), 64)]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(parts), atol=pair.bound)


def test_a_batch_whose_texts_move_at_different_steps(pair: Pair) -> None:
    lengths = [200, 61, 3]
    with pair.feeder(3) as feeder:
        for number, length in enumerate(lengths):
            feeder.skip(number, TEXTS[number][:length])
        for step in range(80):
            fed = [text[length + step] for text, length in zip(TEXTS, lengths, strict=True)]
            logits = feeder.decode(fed).copy()
            if step % 13 == 0 or step > 76:
                for row, text, length in zip(logits, TEXTS, lengths, strict=True):
                    pair.check(row, text[: length + step + 1])


# Going back


@pytest.mark.parametrize("length", [WINDOW - 2, ROWS, ROWS + 1, ROWS + STEP // 2, 300])
def test_going_back_is_right_however_far(length: int, pair: Pair) -> None:
    for back in [*range(1, 6), WINDOW - 1, WINDOW, STEP - 1, STEP, 2 * WINDOW, 2 * STEP]:
        if back > length:
            continue
        with pair.feeder() as feeder:
            feeder.skip(0, TEXT[:length])
            left = length - back
            if feeder.cache.rewindable(0, left) != left:
                with pytest.raises(ValueError, match="whose window is no longer kept: expected 0"):
                    feeder.cache.truncate(0, left)
            feeder.rewind(0, TEXT[:left])
            assert feeder.cache.lengths.tolist() == [left]
            other = [*TEXT[:left], *TEXTS[0][:7]]
            pair.check(feeder.prefill(0, TEXTS[0][:7]), other)


def test_what_is_revocable_can_be_taken_back(pair: Pair) -> None:
    with pair.feeder() as feeder:
        rooms = set()
        for length in range(1, 320, 7):
            feeder.skip(0, TEXT[length - 7 if length > 1 else 0 : length])
            room = feeder.cache.revocable(0)
            rooms.add(room == 0)
            if room:
                feeder.skip(0, TEXTS[0][:room])
                for taken in range(room, -1, -1):
                    assert feeder.cache.rewindable(0, length + taken) == length + taken
                feeder.cache.truncate(0, length)
        pair.check(feeder.prefill(0, TEXT[length : length + 2]), TEXT[: length + 2])
    assert False in rooms


def test_what_is_kept_of_two_texts_is_exchanged_with_them(pair: Pair) -> None:
    length = ROWS - 3
    with pair.feeder(2) as feeder:
        for sequence in range(2):
            feeder.skip(sequence, TEXTS[sequence][:length])
        held = {name: rows.copy() for name, rows in feeder.cache.state(1).items()}
        feeder.cache.load_state(1, length, held)  # the window alone
        feeder.cache.mark(0)
        feeder.skip(0, TEXT[:STEP])
        feeder.cache.swap(0, 1)
        assert feeder.cache.rewindable(0, length - 1) == 0
        assert feeder.cache.rewindable(1, length) == length
        feeder.cache.swap(1, 0)
        assert feeder.cache.rewindable(0, length - 1) == length - 1
        pair.check(feeder.prefill(1, [9]), [*TEXTS[1][:length], 9])
        feeder.cache.truncate(0, length)
        pair.check(feeder.prefill(0, [9]), [*TEXTS[0][:length], 9])


@pytest.mark.parametrize("length", [10, WINDOW, ROWS + 1, 150])
def test_a_mark_can_be_gone_back_to_however_far_the_text_went_on(length: int, pair: Pair) -> None:
    with pair.feeder(2) as feeder:
        size = feeder.cache.nbytes
        for _ in range(2):
            feeder.skip(0, TEXT[int(feeder.cache.lengths[0]) : length])
            feeder.cache.mark(0)
            feeder.skip(0, TEXTS[0][:170])
            assert feeder.cache.rewindable(0, length + 9) == length
            feeder.cache.copy(1, 0, length)
            for sequence in range(2):
                for left in (length, length - 1):
                    if sequence == 0:  # the copy has no mark
                        assert feeder.cache.rewindable(0, left) == left
                    feeder.rewind(sequence, TEXT[:left])
                    pair.check(feeder.prefill(sequence, [3, 4]), [*TEXT[:left], 3, 4])
                feeder.cache.truncate(0, feeder.cache.rewindable(0, length - 1))
        feeder.cache.truncate(0, 0)
        assert feeder.cache.rewindable(0, 0) == 0
        assert feeder.cache.nbytes > size


def test_marks_are_few_and_none_is_made_without_room(pair: Pair) -> None:
    with pair.feeder() as feeder:
        feeder.cache.mark(0)  # of nothing
        feeder.skip(0, TEXT[:100])
        size = feeder.cache.nbytes
        sizes = []
        for begin in (100, 110, 120, 130):
            feeder.cache.mark(0)
            feeder.cache.mark(0)
            sizes.append(feeder.cache.nbytes - size)
            feeder.skip(0, TEXT[begin : begin + 10])
        assert sizes == [sizes[0], *[MOST_MARKS * sizes[0]] * 3]
        feeder.skip(0, TEXT[140:300])
        assert [feeder.cache.rewindable(0, each) for each in (130, 125, 119, 110)] == [
            130,
            120,
            119,
            0,
        ]
        size = feeder.cache.nbytes
        feeder.cache.truncate(0, 0)
        assert feeder.cache.nbytes == size - MOST_MARKS * sizes[0]
    cache = FakeRuntime(300, CONTEXT, window=8, rows=16).new_cache(1)
    cache._budget = KVBudget(100)
    cache.append(0, range(1, 41))
    cache.lengths[0] = 40
    cache.mark(0)
    assert cache._budget.exchange(0, 36) is None  # 8 rows of 8 bytes are held
    cache.mark(0)
    cache.append(0, [7])
    cache.lengths[0] = 41
    cache.mark(0)  # no room
    cache.append(0, range(1, 41))
    cache.lengths[0] = 81
    cache.lose()
    assert [cache.rewindable(0, each) for each in (41, 40, 39, 38)] == [40, 40, 39, 0]
    cache.close()
    assert cache._budget.exchange(36, 100) is None


def test_a_prefix_is_copied_where_its_window_is_still_kept(pair: Pair) -> None:
    lengths = range(ROWS - 5, 330, 9)
    copied = []
    with pair.feeder(2) as feeder:
        for length in lengths:
            held = int(feeder.cache.lengths[0])
            feeder.skip(0, TEXT[held:length])
            for back in (0, 1, 3, 40, WINDOW + STEP):
                prefix = max(0, length - back)
                if feeder.cache.rewindable(0, prefix) != prefix:
                    with pytest.raises(ValueError, match="window is no longer kept"):
                        feeder.cache.copy(1, 0, prefix)
                    continue
                copied.append(back)
                feeder.cache.copy(1, 0, prefix)
                assert feeder.cache.rewindable(1, prefix) == prefix
                pair.check(feeder.prefill(1, [5, 6]), [*TEXT[:prefix], 5, 6])
        pair.check(feeder.prefill(0, [7]), [*TEXT[:length], 7])  # the source was left as it was
    assert {0, 40} <= set(copied)


def test_what_is_held_in_the_middle_of_a_text_goes_on_elsewhere_bit_for_bit(pair: Pair) -> None:
    for length in (WINDOW - 1, WINDOW, ROWS, ROWS + 1, 2 * ROWS + 5):
        with pair.feeder() as first, pair.feeder(2) as second:
            first.skip(0, TEXT[:length])
            second.skip(1, TEXTS[1][:150])
            held = first.cache.state(0)
            kinds = {name: (array.dtype, array.shape) for name, array in held.items()}
            assert kinds == first.cache.state_layout(length)
            rows = {shape[1] for _, shape in kinds.values()}
            assert rows == {length, min(length, WINDOW - 1)}
            second.cache.load_state(1, length, held)
            before = length - 1  # of whose window the first position was not saved
            assert second.cache.rewindable(1, before) == (before if length < WINDOW else 0)
            for token in TEXTS[2][:90]:
                expected = first.prefill(0, [token]).copy()
                np.testing.assert_array_equal(second.prefill(1, [token]), expected)


def test_a_step_that_fails_while_rows_move_leaves_no_cache(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no memory")

    for length, closed in ((ROWS - 1, False), (ROWS, True)):
        with pair.feeder() as feeder:
            feeder.skip(0, TEXT[:length])
            with monkeypatch.context() as patch:
                patch.setattr("edge_memllm_runtimes.ort._run", failing)
                with pytest.raises(EdgeMemLLMError, match="no memory"):
                    feeder.decode([1])
            assert feeder.cache.closed == closed


# Everything in any order


class AnyOrder(RuleBasedStateMachine):
    """A cache of two sequences against texts that are computed from their beginnings."""

    pair: Pair

    @initialize()
    def begin(self) -> None:
        self.feeder = self.pair.feeder(2)
        self.texts: list[list[int]] = [[], []]
        self.drawn = self.marked = 0

    def teardown(self) -> None:
        if hasattr(self, "feeder"):
            self.feeder.close()

    def new(self, count: int) -> list[int]:
        self.drawn += count
        return [(7 * n + n // 50) % 250 for n in range(self.drawn - count, self.drawn)]

    @rule(which=st.integers(0, 1), count=st.integers(1, 130))
    def append(self, which: int, count: int) -> None:
        if len(self.texts[which]) + count > CONTEXT:
            return
        self.texts[which] += (more := self.new(count))
        self.pair.check(self.feeder.prefill(which, more), self.texts[which])

    @rule(places=st.sampled_from([None, range(1), range(1, 2)]), count=st.integers(1, 4))
    def decode(self, places: range | None, count: int) -> None:
        for _ in range(count):
            chosen = range(2) if places is None else places
            if max(len(self.texts[which]) for which in chosen) == CONTEXT:
                return
            fed = self.new(len(chosen))
            logits = self.feeder.decode(fed, places)
            for which, token, row in zip(chosen, fed, logits.copy(), strict=True):
                self.texts[which].append(token)
                self.pair.check(row, self.texts[which])

    @rule(which=st.integers(0, 1), back=st.integers(0, 70))
    def truncate(self, which: int, back: int) -> None:
        left = max(0, len(self.texts[which]) - back)
        kept = self.feeder.cache.rewindable(which, left)
        self.feeder.cache.truncate(which, kept)
        del self.texts[which][kept:]

    @rule(which=st.integers(0, 1))
    def mark(self, which: int) -> None:
        self.feeder.cache.mark(which)
        self.marked = len(self.texts[which])

    @rule(which=st.integers(0, 1), back=st.integers(0, 1))
    def go_back_to_a_mark(self, which: int, back: int) -> None:
        self.truncate(which, max(0, len(self.texts[which]) - self.marked + back))

    @rule(source=st.integers(0, 1), back=st.integers(0, 70), itself=st.booleans())
    def copy(self, source: int, back: int, itself: bool) -> None:
        left = max(0, len(self.texts[source]) - back)
        kept = self.feeder.cache.rewindable(source, left)
        target = source if itself else 1 - source
        self.feeder.cache.copy(target, source, kept)
        self.texts[target] = self.texts[source][:kept]

    @rule()
    def swap(self) -> None:
        self.feeder.cache.swap(0, 1)
        self.texts.reverse()

    @rule(which=st.integers(0, 1))
    def move(self, which: int) -> None:
        """To the other place of another cache, by way of what a file would hold."""
        held = {name: array.copy() for name, array in self.feeder.cache.state(which).items()}
        other = [array.copy() for array in self.feeder.cache.state(1 - which).values()]
        self.feeder.cache.truncate(which, 0)
        self.feeder.skip(which, self.new(140))  # over what lies there
        self.feeder.cache.load_state(which, len(self.texts[which]), held)
        for array, before in zip(self.feeder.cache.state(1 - which).values(), other, strict=True):
            np.testing.assert_array_equal(array, before)

    @precondition(lambda self: hasattr(self, "texts"))
    @invariant()
    def lengths_are_those_of_the_texts(self) -> None:
        assert self.feeder.cache.lengths.tolist() == [len(text) for text in self.texts]


def test_any_order_of_steps_and_moves(pair: Pair) -> None:
    machine = type("Machine", (AnyOrder,), {"pair": pair}).TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
    machine("runTest").runTest()
