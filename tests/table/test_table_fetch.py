"""Records fetched by many threads, with and without a record cache in front of every reader."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.errors import CorruptionError, RequestError
from edge_memllm.readers import Reader
from edge_memllm.table.table import Table, TableStatistics
from support.small_model import SmallArtifact
from support.tables import LAYOUT, ids, offset_of, patch


@pytest.mark.parametrize("cached", [False, True])
def test_threads_read_the_same_bytes(small: SmallArtifact, reader: str, cached: bool) -> None:
    expected = resident(small)
    with Artifact.open(small.path) as artifact:
        room = 9 * LAYOUT.record_bytes if cached else 0
        table = Table.open(artifact, reader, record_cache_bytes=room, hot_tokens=[3, 4])
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        buffer = RecordBuffer(LAYOUT, 24)
        for _ in range(40):
            wanted = random.permutation(24)[: random.integers(1, 24)]
            table.announce(wanted.tolist())
            table.fetch(wanted, buffer)
            if content(buffer, len(wanted)) != [expected[token] for token in wanted]:
                wrong.append(seed)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
    found = table.statistics
    assert found.bytes_read == found.records_read * LAYOUT.record_bytes
    assert (found.cache_hits > 0) == cached
    assert found.cache_misses == (found.records_read if cached else 0)
    table.close()


def content(buffer: RecordBuffer, count: int) -> list[bytes]:
    return [b"".join(buffer.parts(slot)) for slot in range(count)]


def resident(small: SmallArtifact) -> list[bytes]:
    """The bytes of every record, straight from the file."""
    file = small.table.read_bytes()
    return [file[offset_of(small, token) :][: LAYOUT.record_bytes] for token in range(24)]


def test_announced_or_not_the_bytes_are_the_same(table: Table, small: SmallArtifact) -> None:
    buffer = RecordBuffer(LAYOUT, 3)
    table.announce([5, 6, 7])
    table.announce([-1, 24, 1 << 70])  # left for fetch to refuse
    table.fetch(ids(7, 5, 0), buffer)
    assert content(buffer, 3) == [resident(small)[token] for token in (7, 5, 0)]
    table.close()
    table.announce([5])


# --- with a record cache ---------------------------------------------------------------------


class Spy:
    """A reader that notes what it is asked for."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.asked, self.announced = reader, [], []

    def read(self, offsets: list[int], targets: list[list[memoryview]]) -> int:
        self.asked.append(offsets)
        return self.reader.read(offsets, targets)

    def announce(self, offsets: list[int], size: int) -> None:
        self.announced.append(offsets)


def spied(small: SmallArtifact, **options: Any) -> tuple[Table, Spy]:
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact, "pread", **options)
    table._reader = Spy(table._reader)
    return table, table._reader


def test_only_what_is_missing_is_read_in_one_batch(small: SmallArtifact) -> None:
    table, spy = spied(small, record_cache_bytes=10 * LAYOUT.record_bytes)
    buffer, expected = RecordBuffer(LAYOUT, 6), resident(small)
    for wanted, missing in [([5, 1, 9], [1, 5, 9]), ([9, 2, 5, 0], [0, 2]), ([5, 2], [])]:
        spy.asked.clear()
        size = len(missing) * LAYOUT.record_bytes
        assert table.fetch(ids(*wanted), buffer) == (len(missing), size, missing)
        assert content(buffer, len(wanted)) == [expected[token] for token in wanted]
        assert spy.asked == ([[offset_of(small, token) for token in missing]] if missing else [])
    table.announce([5, 11, 2])
    assert spy.announced == [[offset_of(small, 11)]]
    assert table.statistics == TableStatistics(5, 5 * LAYOUT.record_bytes, 5, 4, 5)
    spy.reader.close()


def test_hot_tokens_are_read_once(small: SmallArtifact) -> None:
    table, spy = spied(small, record_cache_bytes=4 * LAYOUT.record_bytes, hot_tokens=[7, 8, 9])
    buffer = RecordBuffer(LAYOUT, 24)
    for _ in range(3):
        table.fetch(np.arange(24), buffer)
        assert content(buffer, 24) == resident(small)
    read = [offset for offsets in spy.asked for offset in offsets]
    assert [read.count(offset_of(small, token)) for token in (7, 8, 9)] == [1, 1, 3]
    spy.reader.close()


def test_a_damaged_record_does_not_enter_the_cache(small: SmallArtifact) -> None:
    table, spy = spied(small, record_cache_bytes=24 * LAYOUT.record_bytes)
    original = small.table.read_bytes()
    patch(small.table, offset_of(small, 3), bytes([original[offset_of(small, 3)] ^ 1]))
    for _ in range(2):
        with pytest.raises(CorruptionError, match="the record of token 3 at byte"):
            table.embeddings(ids(2, 3))
    patch(small.table, 0, original)
    assert content_of(table, 3) == resident(small)[3]
    patch(small.table, offset_of(small, 3), bytes(9))  # the cache has what was verified
    assert content_of(table, 3) == original[offset_of(small, 3) :][: LAYOUT.record_bytes]
    spy.reader.close()


def content_of(table: Table, token: int) -> bytes:
    buffer = RecordBuffer(LAYOUT, 1)
    table.fetch(ids(token), buffer)
    return content(buffer, 1)[0]


def test_a_cache_too_small_for_a_record(small: SmallArtifact) -> None:
    before = len(os.listdir("/dev/fd"))
    with Artifact.open(small.path) as artifact:
        message = r"cache of 9 bytes .* one record takes"
        with pytest.raises(RequestError, match=message):
            Table.open(artifact, record_cache_bytes=9)
    assert len(os.listdir("/dev/fd")) == before
