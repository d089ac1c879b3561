from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.errors import RequestError
from edge_memllm.table.table import RecordCache

BYTES = 24


def record(token: int) -> bytes:
    return np.random.default_rng(token).bytes(BYTES)


def store(cache: RecordCache, *tokens: int) -> None:
    for token in tokens:
        data = bytearray(record(token))
        cache.store(token, [memoryview(data)[:7], memoryview(data)[7:7], memoryview(data)[7:]])


def load(cache: RecordCache, token: int) -> bool:
    """Whether the token is there; if so, its bytes must be right."""
    target = bytearray(BYTES)
    found = cache.load(token, [memoryview(target)[:10], memoryview(target)[10:]])
    assert bytes(target) == (record(token) if found else bytes(BYTES))
    return found


def held(cache: RecordCache, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token in cache]


def test_what_was_stored_is_found() -> None:
    cache = RecordCache(4 * BYTES + 23, BYTES)
    assert cache.slots == 4
    assert not load(cache, 7)
    store(cache, 7, 9)
    assert load(cache, 7)
    assert load(cache, 9)
    assert not load(cache, 8)


def test_what_was_not_asked_for_goes_first() -> None:
    cache = RecordCache(4 * BYTES, BYTES)
    store(cache, 1, 2, 3, 4)
    load(cache, 1)
    load(cache, 3)
    store(cache, 5)  # the hand passes 1, which has another turn, and stops at 2
    assert held(cache, range(9)) == [1, 3, 4, 5]
    store(cache, 6)  # it passes 3
    assert held(cache, range(9)) == [1, 3, 5, 6]
    store(cache, 7)  # and now 1 had its turn
    assert held(cache, range(9)) == [3, 5, 6, 7]


def test_a_long_prompt_leaves_what_is_in_use() -> None:
    cache = RecordCache(10 * BYTES, BYTES)
    store(cache, *range(10))
    for token in range(5):
        load(cache, token)
    store(cache, *range(100, 105))
    assert held(cache, range(10)) == list(range(5))


def test_hot_tokens_stay_in_half_of_the_slots_at_most() -> None:
    cache = RecordCache(6 * BYTES, BYTES, hot_tokens=[10, 11, 10, 12, 13, 14])
    assert not load(cache, 10)
    store(cache, 10, 11, 12)
    store(cache, *range(100, 200))
    assert held(cache, range(200)) == [10, 11, 12, 197, 198, 199]
    store(cache, 13, 14)  # too many: treated as any other
    store(cache, *range(100, 103))
    assert held(cache, range(200)) == [10, 11, 12, 100, 101, 102]
    assert all(load(cache, token) for token in (10, 11, 12, 100, 101, 102))


def test_a_cache_for_one_record() -> None:
    cache = RecordCache(BYTES, BYTES, hot_tokens=[1])
    store(cache, 1)
    assert load(cache, 1)
    store(cache, 2)
    assert held(cache, range(3)) == [2]


@pytest.mark.parametrize("capacity", [-5, 0, BYTES - 1])
def test_a_cache_for_less_than_one_record(capacity: int) -> None:
    message = f"cache of {capacity} bytes was asked for, one record takes {BYTES}. Ask for more"
    with pytest.raises(RequestError, match=message):
        RecordCache(capacity, BYTES)


def test_a_cleared_cache_takes_nothing_in() -> None:
    cache = RecordCache(4 * BYTES, BYTES)
    store(cache, 1)
    cache.clear()
    store(cache, 1)
    assert not load(cache, 1)


@settings(deadline=None)
@given(
    slots=st.integers(1, 6),
    hot=st.lists(st.integers(0, 12), max_size=8),
    asked=st.lists(st.integers(0, 12), max_size=200),
)
def test_never_more_than_its_slots_and_never_wrong_bytes(
    slots: int, hot: list[int], asked: list[int]
) -> None:
    cache = RecordCache(slots * BYTES, BYTES, hot)
    kept = list(dict.fromkeys(hot))[: slots // 2]
    seen: set[int] = set()
    for token in asked:
        if not load(cache, token):
            assert not (token in kept and token in seen)
            store(cache, token)
        seen.add(token)
        assert load(cache, token)
        assert len(held(cache, range(13))) <= slots


def test_threads_share_a_cache() -> None:
    cache = RecordCache(5 * BYTES, BYTES, hot_tokens=[0, 1])
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for token in np.random.default_rng(seed).integers(0, 12, 1500).tolist():
                if not load(cache, token):
                    store(cache, token)
        except BaseException as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    assert len(held(cache, range(12))) <= 5
