"""auto: what it takes where, what it says of it, and how it learns of the memory."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_memllm.errors import RequestError, StorageError
from edge_memllm.process.limits import available_memory
from edge_memllm.readers import Reader, Region, choice, open_reader
from edge_memllm.readers.direct import DirectReader
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.uring import UringReader

REGION = Region(start=4096, size=50 * 4096, record_bytes=4000, stride=4096)
SIZE = r"0\.2 MB"
Open = Callable[..., Reader]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "table"
    path.write_bytes(bytes(REGION.end))
    return path


@pytest.fixture
def machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """``machine(memory, pread, uring)``: "auto" where reads take these seconds."""

    def open_(
        memory: int | None, pread: float = 1e-4, uring: float = 1e-4, *, cached: bool = False
    ) -> Reader:
        clock = 0.0

        def perf_counter() -> float:
            return clock

        def pass_(seconds: float) -> Callable[..., int]:
            def read(*_: object) -> int:
                nonlocal clock
                clock += seconds
                return 1

            return read

        monkeypatch.setattr(choice, "_SMALL_BYTES", 1000)
        monkeypatch.setattr(choice, "available_memory", lambda: memory)
        monkeypatch.setattr(choice, "perf_counter", perf_counter)
        monkeypatch.setattr(PreadReader, "read", pass_(pread))
        monkeypatch.setattr(UringReader, "read", pass_(uring))
        file = os.open(path, os.O_RDONLY)
        return open_reader("auto", file, str(path), REGION, cached=cached)

    return open_


def needs(kind: type[UringReader] | type[DirectReader], path: Path) -> None:
    try:
        kind(os.open(path, os.O_RDONLY), str(path), REGION).close()
    except RequestError as error:
        pytest.skip(str(error))


def checked(reader: Reader, name: str, reason: str) -> None:
    assert reader.name == name
    assert re.fullmatch(reason, reader.reason), reader.reason
    reader.close()


def test_a_small_table_is_not_probed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", None)
    reader = open_reader("auto", os.open(path, os.O_RDONLY), str(path), REGION)
    checked(reader, "pread", rf"the table is small \({SIZE}\), the page cache will hold it")


def test_a_table_that_fits_into_memory(machine: Open) -> None:
    reason = rf"its {SIZE} fit into the 3\.00 GB of memory available; a random record took 0\.30 "
    checked(machine(3_000_000_000, 3e-4), "pread", reason + "ms with pread")


def test_memory_that_is_not_known(machine: Open) -> None:
    reason = r"this system does not tell how much memory is available; .* took 0\.30 ms with pread"
    checked(machine(None, 3e-4), "pread", reason)


@pytest.mark.parametrize(
    ("pread", "uring", "cached", "chosen"),
    [
        (2e-4, 1.2e-4, False, "pread"),  # faster, but without what the page cache repeats
        (2e-4, 0.9e-4, False, "uring"),
        (2e-4, 1.9e-4, True, "uring"),
        (2e-4, 2.1e-4, True, "pread"),
    ],
)
def test_a_table_that_does_not_fit(
    machine: Open, path: Path, pread: float, uring: float, cached: bool, chosen: str
) -> None:
    needs(UringReader, path)
    before = len(os.listdir("/dev/fd"))
    reader = machine(100_000, pread, uring, cached=cached)
    reason = (
        rf"its {SIZE} exceed the 0\.1 MB of memory available; a random record took "
        rf"{pread * 1e3:.2f} ms with pread and {uring * 1e3:.2f} ms with uring"
    )
    checked(reader, chosen, reason)
    assert len(os.listdir("/dev/fd")) == before


def test_direct_where_the_kernel_has_no_uring(
    path: Path, machine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(DirectReader, path)

    def refuse(*_: object) -> None:
        raise RequestError("no")

    monkeypatch.setattr(UringReader, "__init__", refuse)
    monkeypatch.setattr(DirectReader, "read", lambda *_: 1)
    checked(machine(1, 1e-3), "direct", r"its .* with pread and 0\.00 ms with direct")


def test_pread_where_nothing_else_works(machine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RequestError("no")

    monkeypatch.setattr(UringReader, "__init__", refuse)
    monkeypatch.setattr(DirectReader, "__init__", refuse)
    checked(machine(1, 1e-3), "pread", r"its .* took 1\.00 ms with pread")


def test_the_probe_reads_records_and_little_else(
    path: Path, machine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    reader = machine(None, 0.02)
    monkeypatch.setattr(choice, "perf_counter", lambda: float(len(seen)))
    monkeypatch.setattr(PreadReader, "read", lambda _, offsets, __: seen.extend(offsets) or 1)
    assert choice._probe([reader], REGION) == [1.0]
    assert len(seen) == 1  # a second a record is far beyond the time a probe may take
    monkeypatch.setattr(choice, "perf_counter", lambda: 0.0)
    choice._probe([reader], REGION)
    assert len(seen) == 9
    assert all((offset - REGION.start) % REGION.stride == 0 for offset in seen)
    assert all(REGION.start <= offset < REGION.end for offset in seen)
    reader.close()


def test_slow_storage_is_told(machine: Open, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        machine(None, 4e-3).close()
        assert not caplog.records
        machine(None, 2e-2).close()
    (record,) = caplog.records
    assert re.search(
        rf"table: a record takes 20 ms to read, .* at most 50 tokens per second.*'ram' if {SIZE}",
        record.getMessage(),
    )


def test_an_error_while_probing_closes_everything(
    path: Path, machine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(choice, "_SMALL_BYTES", 1000)

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StorageError, match=r"reading 4000 bytes at \d+ failed \(Input/output"):
        open_reader("auto", os.open(path, os.O_RDONLY), str(path), REGION)
    assert len(os.listdir("/dev/fd")) == before


# --- memory ----------------------------------------------------------------------------------


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "ascii")


MEMINFO = "MemTotal:       2000 kB\nMemFree:   10 kB\nMemAvailable:    1000 kB\n"


def test_memory_of_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_memory_without_a_group(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO)
    assert available_memory(tmp_path) == 1_024_000


@pytest.mark.parametrize(("own", "outer", "expected"), [
    ("500000", "max", 500_000),
    ("max", "400000", 400_000),
    ("500000", "400000", 400_000),
    ("max", "max", 1_024_000),
    ("9223372036854771712", "9223372036854771712", 1_024_000),
])  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_group(
    tmp_path: Path, version: int, own: str, outer: str, expected: int
) -> None:
    line, base, name = {
        1: ("9:cpu,memory:/outer/own", "memory/", "memory.limit_in_bytes"),
        2: ("0::/outer/own", "", "memory.max"),
    }[version]
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=f"8:pids:/x\n{line}\n")
    for folder, limit in (("outer/own", own), ("outer", outer)):
        path = tmp_path / "sys/fs/cgroup" / base / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n", "ascii")
    assert available_memory(tmp_path) == expected


def test_memory_inside_a_container_that_hides_the_outer_groups(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory:/docker/0a1b\n")
    path = tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes"
    path.parent.mkdir(parents=True)
    path.write_text("300000\n", "ascii")
    assert available_memory(tmp_path) == 300_000


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells")
def test_memory_of_this_machine() -> None:
    memory = available_memory()
    assert memory is not None
    assert 1_000_000 < memory < 1 << 50
