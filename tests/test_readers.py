from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_memllm.errors import RequestError, StorageError
from edge_memllm.readers import Reader, open_reader, ram, reader_names
from edge_memllm.readers.pread import PreadReader

START, SIZE = 100, 5000  # a region in the middle of a file of 6000 bytes
Open = Callable[[], Reader]


@pytest.fixture
def path(tmp_path: Path, random: np.random.Generator) -> Path:
    path = tmp_path / "table"
    path.write_bytes(random.bytes(6000))
    return path


@pytest.fixture(params=["pread", "seek", "ram"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every reader, and "seek": what pread does on a system without preadv and fadvise."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "posix_fadvise")
    return request.param


def open_(kind: str, path: Path) -> Reader:
    file = os.open(path, os.O_RDONLY)
    return open_reader("pread" if kind == "seek" else kind, file, str(path), START, SIZE)


def buffers(sizes: Sequence[Sequence[int]]) -> list[list[bytearray]]:
    return [[bytearray(size) for size in parts] for parts in sizes]


def views(targets: list[list[bytearray]]) -> list[list[memoryview]]:
    return [[memoryview(part) for part in parts] for parts in targets]


def test_reader_fills_every_part_from_its_offset(kind: str, path: Path) -> None:
    content = path.read_bytes()
    reader = open_(kind, path)
    offsets = [START, 4000, 700, START + SIZE - 30]
    targets = buffers([[10, 20, 300], [1], [512, 0, 7], [30]])
    calls = reader.read(offsets, views(targets))
    for offset, parts in zip(offsets, targets, strict=True):
        joined = b"".join(parts)
        assert joined == content[offset : offset + len(joined)]
    assert calls == {"pread": 4, "seek": 7, "ram": 0}[kind]
    assert reader.read([], []) == 0
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
        for offset in random.integers(START, START + SIZE - 64, 300).tolist():
            target = buffers([[20, 44]])
            reader.read([offset], views(target))
            if b"".join(target[0]) != content[offset : offset + 64]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    reader.close()


def test_reader_closes_its_file(kind: str, path: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        open_(kind, path).close()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("kind", ["pread", "seek"], indirect=True)
def test_file_cut_short_while_open(kind: str, path: Path) -> None:
    reader = open_(kind, path)
    os.truncate(path, 1000)
    with pytest.raises(StorageError, match=r"the file ends at 1000, 50 bytes early.* cut short"):
        reader.read([950], views(buffers([[100]])))
    with pytest.raises(StorageError, match=r"table: the file ends at 4000, 10 bytes early"):
        reader.read([4000], views(buffers([[10]])))
    reader.close()


def test_file_shorter_than_its_region_cannot_be_loaded(path: Path) -> None:
    os.truncate(path, 3000)
    with pytest.raises(StorageError, match="the file ends at 3000, 2100 bytes early"):
        open_("ram", path)


def test_partial_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, real = path.read_bytes(), os.preadv

    def at_most_7_bytes(file: int, parts: list[memoryview], offset: int) -> int:
        return real(file, [parts[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", at_most_7_bytes)
    reader = open_("pread", path)
    target = buffers([[10, 0, 4, 30]])
    assert reader.read([200], views(target)) == 2 + 1 + 5
    assert b"".join(target[0]) == content[200:244]
    reader.close()


@pytest.mark.parametrize("failing", range(4))
def test_an_error_of_the_device_at_any_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.preadv, 0

    def preadv(file: int, parts: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = open_("pread", path)
    offsets = [1000, 2000, 3000, 4000]
    match = rf"table: reading 9 bytes at {offsets[failing]} failed \(Input/output error\)"
    with pytest.raises(StorageError, match=match):
        reader.read(offsets, views(buffers([[4, 5]] * 4)))
    target = buffers([[16]])
    reader.read([3000], views(target))  # the next read is served again
    assert target[0][0] == path.read_bytes()[3000:3016]
    reader.close()


def test_ram_loads_in_chunks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "_CHUNK_BYTES", 999)
    reader = open_("ram", path)
    target = buffers([[SIZE]])
    reader.read([START], views(target))
    assert target[0][0] == path.read_bytes()[START : START + SIZE]
    reader.close()


def test_ram_names_what_it_needs(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    size = 1 << 62
    with pytest.raises(StorageError, match=f"the records need {size} bytes.* Use the reader 'pre"):
        open_reader("ram", file, str(path), 0, size)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_auto_says_what_it_chose(path: Path) -> None:
    reader = open_("auto", path)
    assert reader.name == "pread"
    reader.close()


def test_unknown_reader(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(RequestError, match="Unknown reader 'mmap', expected one of auto, pread"):
        open_reader("mmap", file, str(path), START, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_every_name_opens(path: Path) -> None:
    for name in reader_names():
        reader = open_(name, path)
        assert name in ("auto", reader.name)
        reader.close()


def test_records_are_announced_in_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = os.preadv
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: events.append("announce"))
    monkeypatch.setattr(os, "preadv", lambda *arguments: events.append("read") or real(*arguments))
    reader = PreadReader(os.open(path, os.O_RDONLY), str(path))
    events.clear()
    reader.read([0], views(buffers([[8]])))
    assert events == ["read"]
    events.clear()
    reader.read(list(range(100)), views(buffers([[8]] * 100)))
    assert events == ["announce"] * 64 + ["read"] * 64 + ["announce"] * 36 + ["read"] * 36
    reader.close()
