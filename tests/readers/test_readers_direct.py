"""Reading past the page cache: alignment, threads, and the io_uring queue with its refusals."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.errors import RequestError, StorageError
from edge_memllm.readers import Region, open_reader, uring
from edge_memllm.readers import reader as open_file
from edge_memllm.readers import uring as ring
from edge_memllm.readers.direct import DirectReader
from edge_memllm.readers.reader import Arena, Span
from edge_memllm.readers.uring import Ring, UringReader
from support.tables import buffers, is_closed, views

REGION = Region(start=4096, size=300 * 2560, record_bytes=2500, stride=2560)
OFFSETS = [REGION.start + i * REGION.stride for i in range(REGION.count)]


@pytest.fixture
def path(tmp_path: Path, random: np.random.Generator) -> Path:
    path = tmp_path / "table"
    path.write_bytes(random.bytes(REGION.end + 100))
    return path


@pytest.fixture
def direct(path: Path) -> Iterator[DirectReader]:
    yield from opened("direct", path)


@pytest.fixture
def uring_reader(path: Path) -> Iterator[UringReader]:
    yield from opened("uring", path)


def opened(name: str, path: Path) -> Iterator[Any]:
    try:
        reader = open_reader(name, os.open(path, os.O_RDONLY), str(path), REGION)
    except RequestError as error:
        pytest.skip(str(error))
    yield reader
    reader.close()


def records(reader: Any, offsets: list[int]) -> list[bytes]:
    targets = buffers([[1000, 1500]] * len(offsets))
    assert reader.read(offsets, views(targets)) == len(offsets)
    return [b"".join(parts) for parts in targets]


def expected(path: Path, offsets: list[int]) -> list[bytes]:
    content = path.read_bytes()
    return [content[offset : offset + 2500] for offset in offsets]


# --- alignment -------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    offset=st.integers(0, 1 << 50), size=st.integers(1, 1 << 20), power=st.sampled_from([512, 4096])
)
def test_a_span_is_the_smallest_aligned_range_around(offset: int, size: int, power: int) -> None:
    span = Span.around(offset, size, power)
    assert span.begin % power == span.length % power == 0
    assert span.begin <= offset < span.begin + power
    assert span.skip == offset - span.begin
    assert span.needed == span.skip + size
    assert span.needed <= span.length < span.needed + power


@pytest.mark.parametrize("alignment", [512, 4096])
@pytest.mark.parametrize("record_bytes", [1, 511, 512, 2500, 4096, 54784])
def test_every_record_fits_a_slot_at_any_place(alignment: int, record_bytes: int) -> None:
    arena = Arena(3, Region(0, record_bytes, record_bytes, record_bytes), alignment)
    assert all(address % 4096 == 0 for address in arena.addresses)
    worst = Span.around(alignment - 1, record_bytes, alignment)
    assert all(len(slot) >= worst.length for slot in arena.slots)
    arena.slots[1][:3] = b"abc"
    assert ctypes.string_at(arena.addresses[1], 3) == b"abc"


def only_multiples_of(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let direct reads behave as on a device with such blocks."""
    real = os.preadv

    def preadv(file: int, parts: list[memoryview], offset: int) -> int:
        if offset % block or any(len(part) % block for part in parts):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def test_larger_blocks_are_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_multiples_of(4096, monkeypatch)
    for reader in opened("direct", path):
        assert reader.alignment == 4096
        assert records(reader, OFFSETS) == expected(path, OFFSETS)


def test_no_block_size_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_multiples_of(1 << 20, monkeypatch)
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(RequestError, match=r"does not read past the page cache \(Invalid argument"):
        open_reader("direct", file, str(path), REGION)
    assert is_closed(file)


def test_device_error_while_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(StorageError, match=r"reading 512 bytes at 4096 failed \(Input/output erro"):
        open_reader("direct", file, str(path), REGION)
    assert is_closed(file)


@pytest.mark.parametrize("name", ["direct", "uring"])
def test_file_system_that_refuses(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(file: int, command: int, value: int = 0) -> int:
        if value & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0

    monkeypatch.setattr(open_file.fcntl, "fcntl", refuse)
    file = os.open(path, os.O_RDONLY)
    message = r"table: its file system does not read past .* \(Invalid argument\). Use .* 'pread'"
    with pytest.raises(RequestError, match=message):
        open_reader(name, file, str(path), REGION)
    assert is_closed(file)


def test_direct_batches_of_any_length(path: Path, direct: DirectReader) -> None:
    for count in (1, 2, 7, 8, 9, 31, 300):
        assert records(direct, OFFSETS[:count]) == expected(path, OFFSETS[:count])


def test_error_of_one_thread_waits_for_the_others(
    path: Path, direct: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, busy, most_after = os.preadv, threading.Semaphore(0), []

    def preadv(file: int, parts: list[memoryview], offset: int) -> int:
        if offset == OFFSETS[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        busy.release()
        most_after.append(offset)
        return real(file, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StorageError, match=r"at 4096 failed \(Input/output error\)"):
        direct.read(OFFSETS, views(buffers([[2500]] * len(OFFSETS))))
    done = len(most_after)
    assert done >= 300 * 7 // 8  # all but the stretch that failed
    direct.read([OFFSETS[5]], views(buffers([[2500]])))
    assert len(most_after) == done + 1


# --- io_uring --------------------------------------------------------------------------------


def test_uring_batches_of_any_length(path: Path, uring_reader: UringReader) -> None:
    for count in (1, 2, 63, 64, 65, 300):
        assert records(uring_reader, OFFSETS[:count]) == expected(path, OFFSETS[:count])
    backwards = OFFSETS[::-1]
    assert records(uring_reader, backwards) == expected(path, backwards)


@pytest.mark.parametrize("lie", [0, 512, -errno.EAGAIN, -errno.EINTR, -errno.EIO])
def test_uring_reads_again_what_came_back_short(
    path: Path, uring_reader: UringReader, monkeypatch: pytest.MonkeyPatch, lie: int
) -> None:
    real = Ring.completions

    def completions(self: Ring) -> Iterator[tuple[int, int]]:
        for tag, result in real(self):
            yield tag, lie if tag % 3 == 0 else result

    monkeypatch.setattr(Ring, "completions", completions)
    targets = buffers([[1000, 1500]] * 100)
    assert uring_reader.read(OFFSETS[:100], views(targets)) > 100
    assert [b"".join(parts) for parts in targets] == expected(path, OFFSETS[:100])


def test_uring_goes_on_after_an_error_in_the_middle(
    path: Path, uring_reader: UringReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: object) -> int:
        raise StorageError("failed on purpose")

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(uring_reader, "_take", take)
            with pytest.raises(StorageError, match="on purpose"):
                uring_reader.read(OFFSETS, views(buffers([[2500]] * len(OFFSETS))))
        assert uring_reader._ring.in_flight
        assert records(uring_reader, OFFSETS) == expected(path, OFFSETS)


class Flaky:
    """A system call that fails with the given errors before it works."""

    def __init__(self, real: Any, numbers: list[int]) -> None:
        self.real, self.numbers = real, numbers

    def __call__(self, *arguments: Any) -> Any:
        if self.numbers:
            raise OSError(self.numbers[0], os.strerror(self.numbers.pop(0)))
        return self.real(*arguments)


def test_uring_waits_while_the_kernel_is_busy(path: Path, uring_reader: UringReader) -> None:
    busy = [errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.EINTR]
    uring_reader._ring._call = Flaky(uring_reader._ring._call, busy)
    assert records(uring_reader, OFFSETS) == expected(path, OFFSETS)
    assert not busy


@pytest.mark.parametrize("numbers", [[errno.EBADF], [errno.EAGAIN] * 9])
def test_uring_that_stops_working(
    uring_reader: UringReader, monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    monkeypatch.setattr(ring, "_WAIT_MILLISECONDS", 9)
    message = rf"table: io_uring failed \({os.strerror(numbers[0])}\). Use the reader 'direct'"
    uring_reader._ring._call = Flaky(uring_reader._ring._call, list(numbers))
    with pytest.raises(StorageError, match=message):
        uring_reader.read(OFFSETS[:5], views(buffers([[2500]] * 5)))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_uring_refused_by_the_kernel(
    path: Path, uring_reader: UringReader, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(ring, "_system_call", lambda: Flaky(None, [number]))
    file = os.open(path, os.O_RDONLY)
    name = errno.errorcode[number]
    message = rf"refuses io_uring \({name}: {os.strerror(number)}\).* Use the reader 'direct' or"
    with pytest.raises(RequestError, match=message):
        open_reader("uring", file, str(path), REGION)
    assert is_closed(file)


def test_uring_of_an_old_kernel(
    path: Path, uring_reader: UringReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_CURRENT_POSITION", 1 << 31)
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(RequestError, match=r"ENOSYS: its io_uring is older than Linux 5.6"):
        uring._open_ring("table")
    assert len(os.listdir("/dev/fd")) == before


def test_uring_elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(RequestError, match=r"needs Linux on x86-64, this is \w+ on aarch64. Use"):
        uring._open_ring("table")


def test_the_kernel_refuses_a_ring_of_no_entries() -> None:
    with pytest.raises(OSError, match=r"Invalid argument|not implemented|not permitted"):
        Ring(0)
