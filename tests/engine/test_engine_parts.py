"""The parts of the engine by themselves: the queue, the slots."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.engine.engine import FairQueue
from edge_memllm.engine.slots import LEAST_COPY, Beginning, Slot, Slots, common_length
from edge_memllm.overlays.loaded import Selection
from edge_memllm.table.source import RecordSource
from edge_memllm_runtimes.fake import FakeCache, FakeRuntime
from support.checkpoints import VOCABULARY

CONTEXT = 64
RECORDS = Selection(cast(RecordSource, object()), ())


# The queue


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=30))
def test_every_client_keeps_its_order_and_waits_for_one_of_each_other(
    steps: list[tuple[str, int]],
) -> None:
    """Items are pushed and taken; whoever waits is passed at most once by each other client."""
    queue = FairQueue[tuple[str, int]]()
    expected: dict[str, list[int]] = {name: [] for name in "abcd"}
    passed: dict[str, list[str]] = {}

    def take() -> None:
        found = queue.pop()
        if found is None:
            assert not any(expected.values())
            return
        client, number = found
        assert expected[client].pop(0) == number
        passed.pop(client)
        for others in passed.values():
            assert client not in others
            others.append(client)
        if expected[client]:
            passed[client] = []

    for number, (client, taken) in enumerate(steps):
        queue.push(client, [(client, number)])
        expected[client].append(number)
        passed.setdefault(client, [])
        assert len(queue) == sum(map(len, expected.values())) == len(list(queue))
        assert queue.waiting(client) == len(expected[client])
        for _ in range(taken):
            take()
    while queue:
        take()
    assert queue.pop() is None


def test_what_is_unwanted_leaves_the_queue() -> None:
    queue = FairQueue[int]()
    queue.push("a", [1, 2, 3, 4])
    queue.push("b", [6])
    assert queue.remove(lambda item: item % 2 == 0) == [2, 4, 6]
    assert [queue.pop(), queue.pop(), queue.pop()] == [1, 3, None]


# The slots


@settings(deadline=None)
@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_length_is_that_of_the_common_beginning(one: list[int], two: list[int]) -> None:
    length = common_length(one, two)
    assert one[:length] == two[:length]
    assert one[: length + 1] != two[: length + 1] or length in (len(one), len(two))


def of(tokens: list[int], records: Selection = RECORDS) -> Beginning:
    return Beginning(tokens, records)


class FilledSlots:
    """Slots over a cache of the fake runtime; what is appended there is the token itself."""

    def __init__(self, places: int, *, copies: bool = True, grain: int = 1) -> None:
        self.cache: FakeCache = FakeRuntime(VOCABULARY, CONTEXT).new_cache(places)
        self.cache.copies = copies
        self.slots = Slots(self.cache, CONTEXT, grain)

    def append(self, slot: Slot, tokens: list[int]) -> None:
        self.cache.states[slot.place] += tokens
        self.cache.lengths[slot.place] += len(tokens)
        self.slots.note_chunk(slot, tokens)

    def fill(self, prompt: list[int]) -> Slot:
        slot = self.slots.take(of(prompt))
        self.append(slot, prompt[len(slot.tokens) :])
        return slot

    def check(self) -> None:
        for slot in self.slots.at(range(self.cache.batch)):
            assert self.cache.states[slot.place] == slot.tokens
            assert self.cache.lengths[slot.place] == len(slot.tokens)


def test_the_place_longest_unused_is_taken() -> None:
    made = FilledSlots(3)
    slots = [made.fill([n] * 5) for n in range(3)]
    for number in (1, 2, 0):
        made.slots.give_back(slots[number])
    assert [made.fill([9]).place for _ in range(3)] == [1, 2, 0]
    made.check()


def test_a_text_that_goes_on_gets_its_place_and_one_that_begins_alike_a_copy() -> None:
    made = FilledSlots(3)
    told = [*range(40)]
    first = made.fill(told)
    made.slots.give_back(first)
    other = made.slots.take(of([*told[:15], 50]))
    assert (other is first, other.tokens) == (False, [])
    assert made.slots.share(other, of([*told[:15], 50])) == 15
    made.check()
    assert made.slots.take(of([*told, 41])) is first
    assert first.tokens == told


def test_a_place_in_use_is_copied_from() -> None:
    made = FilledSlots(2)
    made.fill([*range(20)])
    other = made.slots.take(of([*range(20)]))
    assert made.slots.share(other, of([*range(20)])) == 19  # the last token gives the logits
    assert made.slots.share(other, of([*range(20)])) == 0
    made.check()


def test_without_copies_the_likest_place_is_taken() -> None:
    made = FilledSlots(2, copies=False)
    told = [*range(40)]
    first = made.fill(told)
    made.slots.give_back(first)
    assert made.slots.take(of([*told[:5], 50])) is first
    other = made.slots.take(of([*told[:5], 51]))
    assert made.slots.share(other, of([*told[:5], 51])) == 0
    assert not made.slots.worth_waiting(first, of(told), other, of(told))
    made.check()


def test_other_records_give_other_keys_and_values() -> None:
    made = FilledSlots(3)
    told = [*range(40)]
    first = made.fill(told)
    made.slots.give_back(first)
    other = made.slots.take(of([*told, 41], RECORDS._replace(source=cast(RecordSource, object()))))
    assert other is not first
    assert made.slots.share(other, of([*told, 41], other.records)) == 0
    assert not made.slots.worth_waiting(first, of(told), other, of(told, other.records))


def test_little_is_not_worth_a_copy() -> None:
    made = FilledSlots(2)
    made.fill([*range(LEAST_COPY - 1), 60])
    other = made.slots.take(of([*range(40)]))
    assert made.slots.share(other, of([*range(40)])) == 0


@pytest.mark.parametrize(("reply", "reused"), [(0, 16), (30, 16)])
def test_with_a_grain_only_whole_chunks_are_used_again(reply: int, reused: int) -> None:
    made = FilledSlots(2, grain=8)
    prompt = [*range(20)]
    first = made.slots.take(of(prompt))
    for begin in (0, 8, 16):
        made.append(first, prompt[begin : begin + 8])
    made.append(first, [21] * reply)
    made.slots.give_back(first)
    again = made.slots.take(of([*first.tokens, 5]))
    made.slots.share(again, of([*first.tokens, 5]))
    assert len(again.tokens) == reused
    made.check()


def test_a_full_place_keeps_room_for_one() -> None:
    made = FilledSlots(1)
    slot = made.fill([1] * CONTEXT)
    made.slots.give_back(slot)
    assert made.cache.lengths[0] == CONTEXT - 1
    made.check()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), places=st.integers(1, 6), copies=st.booleans())
def test_texts_are_brought_together_and_nothing_is_lost(
    data: Any, places: int, copies: bool
) -> None:
    made = FilledSlots(places, copies=copies)
    slots = [made.fill([n] * (n + 1)) for n in range(places)]
    for _ in range(4):
        chosen = data.draw(st.lists(st.sampled_from(slots), min_size=1, unique=True))
        covered = made.slots.gather(chosen)
        assert set(chosen) <= set(made.slots.at(covered))
        if copies:
            assert covered == range(len(chosen))
        made.check()
    assert [slot.tokens for slot in slots] == [[n] * (n + 1) for n in range(places)]
