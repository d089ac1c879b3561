"""What every reader must do, and what the plain ones do on other systems."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_memllm.errors import RequestError, StorageError
from edge_memllm.readers import Reader, open_reader, reader_names
from edge_memllm.readers import reader as open_file_module
from edge_memllm.readers.pread import PreadReader
from support.tables import REGION, SIZE, START, buffers, is_closed, open_, views

KINDS = ("pread", "seek", "direct", "uring", "mmap", "ram")
Open = Callable[[], Reader]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, path: Path) -> str:
    """Every reader, and "seek": what pread does on a system without preadv and fadvise."""
    if request.param == "seek":
        without_posix(monkeypatch)
    if request.param in ("direct", "uring"):
        try:
            open_(request.param, path).close()
        except RequestError as error:
            pytest.skip(str(error))
    return request.param


def without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "posix_fadvise")


# --- every reader ----------------------------------------------------------------------------


def test_reader_fills_every_part_from_its_offset(kind: str, path: Path) -> None:
    content = path.read_bytes()
    reader = open_(kind, path)
    offsets = [START, 4000, 700, START + SIZE - 30]
    targets = buffers([[10, 20, 300], [1], [512, 0, 7], [30]])
    calls = reader.read(offsets, views(targets))
    for offset, parts in zip(offsets, targets, strict=True):
        joined = b"".join(parts)
        assert joined == content[offset : offset + len(joined)]
    assert calls == (0 if kind == "ram" else 4)
    assert reader.read([], []) == 0
    assert reader.reason == "asked for"
    reader.close()


def test_reader_serves_many_records_at_once(kind: str, path: Path) -> None:
    content = path.read_bytes()
    reader = open_(kind, path)
    offsets = list(range(START, START + SIZE - 8, 7))
    targets = buffers([[3, 5]] * len(offsets))
    reader.read(offsets, views(targets))
    assert [b"".join(parts) for parts in targets] == [
        content[offset : offset + 8] for offset in offsets
    ]
    reader.close()


def test_reader_is_safe_to_use_from_threads(kind: str, path: Path) -> None:
    content = path.read_bytes()
    reader = open_(kind, path)
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for round_ in range(100):
            count = 1 if round_ % 2 else 20
            offsets = sorted(random.integers(START, START + SIZE - 64, count).tolist())
            targets = buffers([[20, 44]] * count)
            reader.announce(offsets, 64)
            reader.read(offsets, views(targets))
            for offset, target in zip(offsets, targets, strict=True):
                if b"".join(target) != content[offset : offset + 64]:
                    wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    reader.close()


def test_reader_may_be_told_what_comes(kind: str, path: Path) -> None:
    reader = open_(kind, path)
    reader.announce([START, 2000, START + SIZE - 9], 9)
    reader.announce([], 9)
    target = buffers([[9]])
    reader.read([2000], views(target))
    assert target[0][0] == path.read_bytes()[2000:2009]
    reader.close()


def test_reader_closes_its_file(kind: str, path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        open_(kind, path).close()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("count", [1, 2, 20])
def test_closed_reader_says_so(kind: str, path: Path, count: int) -> None:
    reader = open_(kind, path)
    reader.read([START] * 20, views(buffers([[5]] * 20)))
    reader.close()
    reader.close()
    with pytest.raises(StorageError, match="table: the reader is closed"):
        reader.read([START] * count, views(buffers([[5]] * count)))


@pytest.mark.parametrize("kind", ["pread", "seek", "direct", "uring"], indirect=True)
@pytest.mark.parametrize("others", [0, 1, 30])
def test_file_cut_short_while_open(kind: str, path: Path, others: int) -> None:
    reader = open_(kind, path)
    os.truncate(path, 1000)
    around = [500] * others
    with pytest.raises(StorageError, match=r"the file ends at 1000, 50 bytes early.* cut short"):
        reader.read([*around, 950], views(buffers([[100]] * (others + 1))))
    with pytest.raises(StorageError, match=r"table: the file ends at 4000, 10 bytes early"):
        reader.read([*around, 4000], views(buffers([[10]] * (others + 1))))
    target = buffers([[500]])
    reader.read([500], views(target))  # what is still there can be read
    assert target[0][0] == path.read_bytes()[500:]
    reader.close()


def test_every_name_opens(path: Path) -> None:
    assert reader_names() == ("auto", "pread", "direct", "uring", "mmap", "ram")
    for name in ("auto", "pread", "mmap", "ram"):
        reader = open_(name, path)
        assert name in ("auto", reader.name)
        reader.close()


def test_unknown_reader(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(RequestError, match="Unknown reader 'tape', expected one of auto, pread, d"):
        open_reader("tape", file, str(path), REGION)
    assert is_closed(file)


# --- pread -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pread", "direct"], indirect=True)
def test_partial_reads_are_continued(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, real, step = path.read_bytes(), os.preadv, 7 if kind == "pread" else 512
    reader = open_(kind, path)

    def at_most_a_step(file: int, parts: list[memoryview], offset: int) -> int:
        return real(file, [parts[0][:step]], offset)

    monkeypatch.setattr(os, "preadv", at_most_a_step)
    target = buffers([[10, 0, 4, 30] if kind == "pread" else [10, 0, 900, 90]])
    calls = reader.read([200], views(target))
    assert calls == (2 + 1 + 5 if kind == "pread" else 3)
    joined = b"".join(target[0])
    assert joined == content[200 : 200 + len(joined)]
    reader.close()


def cut(parts: list[memoryview], count: int) -> int:
    """Take back what lies behind `count` bytes of what was read."""
    count = min(count, len(parts[0]))
    parts[0][count:] = bytes(len(parts[0]) - count)
    for part in parts[1:]:
        part[:] = bytes(len(part))
    return count


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("short", [0, 1, 100, 511, 513, 1000])
@pytest.mark.parametrize("kind", ["pread", "direct", "uring"], indirect=True)
def test_a_single_short_read_is_no_end_of_the_file(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch, short: int, failing: int
) -> None:
    if kind == "pread" and short == 0:
        pytest.skip("means the end of the file")
    content, real, calls = path.read_bytes(), os.preadv, iter(range(1000))
    reader = open_(kind, path)

    def once_short(file: int, parts: list[memoryview], offset: int) -> int:
        count = real(file, parts, offset)
        return cut(parts, short) if next(calls) == failing else count

    monkeypatch.setattr(os, "preadv", once_short)
    target = buffers([[10, 0, 900, 90]])
    for _ in range(3):
        reader.read([200], views(target))
    joined = b"".join(target[0])
    assert joined == content[200 : 200 + len(joined)]
    reader.close()


@pytest.mark.parametrize("kind", ["direct"], indirect=True)
def test_a_device_that_never_gives_a_block(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, real = open_(kind, path), os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, parts, at: real(file, parts, at) and cut(parts, 100)
    )
    with pytest.raises(StorageError, match=r"less than a block of \d+ bytes at \d+ 16 times"):
        reader.read([200], views(buffers([[10, 900]])))
    reader.close()


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("kind", ["pread", "direct"], indirect=True)
def test_an_error_of_the_device_at_any_read(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.preadv, 0
    reader = open_(kind, path)

    def preadv(file: int, parts: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    offsets = [1000, 2000, 3000, 4000]
    with pytest.raises(StorageError, match=r"table: reading 9 bytes at \d+ failed \(Input/outpu"):
        reader.read(offsets, views(buffers([[4, 5]] * 4)))
    target = buffers([[16]])
    reader.read([3000], views(target))  # the next read is served again
    assert target[0][0] == path.read_bytes()[3000:3016]
    reader.close()


def test_records_are_announced_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = os.preadv
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: events.append("a"))
    monkeypatch.setattr(os, "preadv", lambda *arguments: events.append("r") or real(*arguments))
    reader = PreadReader(os.open(path, os.O_RDONLY), str(path))
    events.clear()
    reader.read([0], views(buffers([[8]])))
    assert events == ["r"]
    events.clear()
    reader.read(list(range(100)), views(buffers([[8]] * 100)))
    assert "".join(events) == "a" * 64 + "ra" * 36 + "r" * 64
    reader.close()


def test_without_preadv_a_record_is_one_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which also has no way to announce."""
    without_posix(monkeypatch)
    monkeypatch.setattr(open_file_module, "fcntl", None)
    reader = open_("seek", path)
    target = buffers([[10, 0, 400, 3]])
    reader.announce([START], 413)
    assert reader.read([START], views(target)) == 1
    assert b"".join(target[0]) == path.read_bytes()[START : START + 413]
    reader.close()
    for name in ("direct", "uring"):
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        with pytest.raises(RequestError, match=r"'direct' and 'uring' need O_DIRECT .* 'pread'"):
            open_(name, path)


def test_announcing_on_macos(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has no posix_fadvise, but a command for fcntl."""
    told: list[tuple[int, Any]] = []
    system = SimpleNamespace(
        F_RDADVISE=44, F_NOCACHE=48, fcntl=lambda file, *rest: told.append(rest)
    )
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(open_file_module, "fcntl", system)
    reader = open_("pread", path)
    reader.announce([START, 3000], 77)
    reader.close()
    assert [(command, struct.unpack("=qi4x", value)) for command, value in told] == [
        (44, (START, 77)),
        (44, (3000, 77)),
    ]
    told.clear()
    reader = open_("direct", path)
    target = buffers([[50]])
    reader.read([777], views(target))
    assert target[0][0] == path.read_bytes()[777:827]
    reader.close()
    assert told == [(48, 1)]
