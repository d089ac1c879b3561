"""Files out of the page cache, those that this process has mapped included. Linux only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # MADV_DONTNEED: the pages of a mapped file are read again when touched


def drop(file: Path, offset: int = 0, length: int | None = None) -> None:
    """Drop what the page cache has of a range of a file, by default all of it.

    A page stays as long as any process has it mapped; this one lets go of its own.
    """
    end = file.stat().st_size if length is None else offset + length
    _unmap(file, offset, end)
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)  # pages that are not yet written cannot be dropped
        os.posix_fadvise(handle, offset, end - offset, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _unmap(file: Path, offset: int, end: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    page = os.sysconf("SC_PAGE_SIZE")
    for address, start, size in _mappings(file):
        first = max(offset, start) + -max(offset, start) % page
        last = min(end, start + size) // page * page
        if last > first:
            place = ctypes.c_void_p(address + first - start)
            if library.madvise(place, ctypes.c_size_t(last - first), _DONT_NEED):
                raise OSError(ctypes.get_errno(), f"{file}: its mapped pages stay.")


def _mappings(file: Path) -> Iterator[tuple[int, int, int]]:
    """Address, place in the file and size of what is mapped of it to be read."""
    name = str(file.resolve())
    for line in _MAPS.read_text("utf-8", errors="surrogateescape").splitlines():
        span, rights, start, _, _, *path = line.split(maxsplit=5)
        if path == [name] and rights.startswith("r-"):
            first, last = (int(each, 16) for each in span.split("-"))
            yield first, int(start, 16), last - first
