"""ram and mmap: what they refuse, and what a map cannot survive."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_memllm.errors import StorageError
from edge_memllm.readers import Region, open_reader
from edge_memllm.readers import in_memory as ram
from edge_memllm.readers.in_memory import MmapReader
from support.tables import REGION, SIZE, START, buffers, is_closed, open_, views


@pytest.mark.parametrize("name", ["ram", "mmap"])
def test_file_shorter_than_its_region_is_not_opened(path: Path, name: str) -> None:
    os.truncate(path, 3000)
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(StorageError, match="the file ends at 3000, 2100 bytes early"):
        open_reader(name, file, str(path), REGION)
    assert is_closed(file)


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
        open_reader("ram", file, str(path), Region(0, 1 << 62, 1 << 31, 1 << 31))
    assert is_closed(file)


def test_mmap_notices_a_cut_before_it_touches_the_file(path: Path) -> None:
    reader = open_("mmap", path)
    os.truncate(path, 1000)
    with pytest.raises(StorageError, match=r"the file ends at 1000, 4100 bytes early.* cut short"):
        reader.read([4000], views(buffers([[10]])))
    reader.close()


def test_mmap_that_the_system_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(StorageError, match=r"5100 bytes cannot be mapped .*memory.* 'pread'"):
        open_reader("mmap", file, str(path), REGION)
    assert is_closed(file)


def test_mmap_without_advice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.delattr(mmap, "MADV_RANDOM", raising=False)
    monkeypatch.delattr(mmap, "MADV_WILLNEED", raising=False)
    reader = MmapReader(os.open(path, os.O_RDONLY), str(path), REGION)
    reader.announce([START], 50)
    target = buffers([[50]])
    reader.read([START], views(target))
    assert target[0][0] == path.read_bytes()[START : START + 50]
    reader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux'")
def test_mmap_cannot_survive_a_cut_that_it_did_not_notice(path: Path) -> None:
    """What docs/performance.md warns of; should it ever pass, the warning can go."""
    code = (
        "import os, sys\n"
        "from edge_memllm.readers import Region, open_reader\n"
        "file = os.open(sys.argv[1], os.O_RDONLY)\n"
        "reader = open_reader('mmap', file, 'table', Region(0, 4 * 4096, 4096, 4096))\n"
        "os.truncate(sys.argv[1], 4096)\n"
        "reader._check_size = lambda: None\n"
        "reader.read([8192], [[memoryview(bytearray(16))]])\n"
    )
    path.write_bytes(bytes(16384))
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == -7
