"""The reader contract: how records get from storage into memory.

A reader fills given byte ranges from given places of one open file. It owns that file, may be
called from several threads at once, and never returns with a range half filled. It knows where
records lie, and nothing of what is in them.

Reads that bypass the page cache want place, length and memory aligned to the device's blocks, so
they cover a little more than was asked for and go into an arena of aligned slots.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self
from weakref import finalize

import numpy as np

from edge_memllm.artifact.open_files import close_file, not_read
from edge_memllm.errors import RequestError, StorageError

ASKED_FOR = "asked for"


@dataclass(frozen=True, slots=True)
class Region:
    """Where the records lie in the file: `size` bytes from `start` on, padding included."""

    start: int
    size: int
    record_bytes: int  # of the largest record, without padding
    stride: int  # records begin at multiples of it, from the start on

    @property
    def count(self) -> int:
        """The places where a record of the largest size may lie."""
        return (self.size - self.record_bytes) // self.stride + 1

    @property
    def end(self) -> int:
        """The first byte behind the records."""
        return self.start + self.size


class Reader(Protocol):
    """One way to read."""

    name: str
    reason: str  # why this reader: "asked for", or a sentence with figures when "auto" chose it

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Fill `targets[i]`, part after part, with the bytes from `offsets[i]` of the file on.

        Each range lies inside the region and is no longer than a record; in the order of the file
        they are read fastest. Returns how many reads of storage the system was asked for. Raises
        `StorageError` when reading fails, the file is too short or the reader is closed.
        """

    def announce(self, offsets: Sequence[int], size: int) -> None:
        """Say that `size` bytes from each offset on will be read soon.

        Only a hint: it returns at once, may do nothing, and never raises for ranges inside the
        file.
        """

    def close(self) -> None:
        """Give up the file and the memory. Closing twice is fine."""


def scatter(source: memoryview, position: int, parts: Sequence[memoryview]) -> None:
    """Copy what lies in `source` from `position` on into `parts`, one after the other."""
    for part in parts:
        end = position + len(part)
        part[:] = source[position:end]
        position = end


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class OpenFile:
    """Owns a descriptor. Thread-safe; `where` names the file in messages."""

    def __init__(self, descriptor: int, where: str) -> None:
        self.where = where
        self.descriptor = descriptor
        self._free = finalize(self, close_file, descriptor)  # also if nobody calls `close`
        self._lock = threading.Lock()
        # One call to the system, with its own error: bytes read, 0 at the end of the file.
        self.read_once = self._positioned if hasattr(os, "preadv") else self._seeking
        self._advise = _adviser()

    def expect_random_reads(self) -> None:
        """Tell the system not to read ahead: behind a record lies one that nobody asked for."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a hint
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def bypass_page_cache(self) -> None:
        """Have all reads go to the device. Raises `RequestError` where that cannot be had."""
        try:
            if hasattr(os, "O_DIRECT"):
                flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & ~os.O_NONBLOCK
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            elif hasattr(fcntl, "F_NOCACHE"):
                fcntl.fcntl(self.descriptor, fcntl.F_NOCACHE, 1)
            else:
                raise RequestError(
                    "The readers 'direct' and 'uring' need O_DIRECT (Linux) or F_NOCACHE (macOS), "
                    "which this system does not have. Use the reader 'pread'."
                )
        except OSError as error:
            raise self.not_direct(error) from error

    def announce(self, offset: int, size: int) -> None:
        """Ask the system to have these bytes in memory soon, where it takes such hints."""
        if self._advise is not None and not self._closed:
            with suppress(OSError):  # a hint; the read that follows has something to say
                self._advise(self.descriptor, offset, size)

    def fill(self, parts: list[memoryview], offset: int) -> int:
        """Fill `parts` from `offset` on; return the number of calls that took."""
        calls = 0
        missing = sum(map(len, parts))
        while missing:
            count = self.read_some(parts, offset, missing)
            if count == 0:
                raise self.cut_short(offset, missing)
            calls, offset, missing = calls + 1, offset + count, missing - count
            if missing:
                parts = _without(parts, count)
        return calls

    def read_some(self, parts: list[memoryview], offset: int, missing: int) -> int:
        """Read once; return how many bytes came, 0 at the end of the file."""
        if self._closed:
            raise StorageError(f"{self.where}: the reader is closed.")
        try:
            return self.read_once(parts, offset)
        except OSError as error:
            raise self.failed(error, offset, missing) from error

    def size(self) -> int:
        """The size of the file now."""
        if self._closed:
            raise StorageError(f"{self.where}: the reader is closed.")
        try:
            return os.fstat(self.descriptor).st_size
        except OSError as error:
            raise not_read(self.where, error) from error

    def failed(self, error: OSError, offset: int, missing: int) -> StorageError:
        """Return the error for a read that the system refused."""
        return StorageError(
            f"{self.where}: reading {missing} bytes at {offset} failed ({error.strerror}). "
            "Check the storage device."
        )

    def cut_short(self, offset: int, missing: int) -> StorageError:
        """Return the error for a file that ends too early."""
        return StorageError(
            f"{self.where}: the file ends at {offset}, {missing} bytes early. It was cut short "
            "while in use; copy the folder again."
        )

    def not_direct(self, error: OSError) -> RequestError:
        """Return the error for a file system without direct reads."""
        return RequestError(
            f"{self.where}: its file system does not read past the page cache ({error.strerror}). "
            "Use the reader 'pread'."
        )

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._free()

    @property
    def _closed(self) -> bool:
        return not self._free.alive

    def _positioned(self, parts: list[memoryview], offset: int) -> int:
        return os.preadv(self.descriptor, parts, offset)

    def _seeking(self, parts: list[memoryview], offset: int) -> int:
        # One read for all parts: a read for each would be three calls a record.
        with self._lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            data = os.read(self.descriptor, sum(map(len, parts)))
        scatter(memoryview(data), 0, _first(parts, len(data)))
        return len(data)


def _adviser() -> Callable[[int, int, int], None] | None:
    """Return the function that announces a range on this system, None where there is none."""
    if hasattr(os, "posix_fadvise"):
        return _fadvise
    return _rdadvise if hasattr(fcntl, "F_RDADVISE") else None


def _fadvise(descriptor: int, offset: int, size: int) -> None:
    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _rdadvise(descriptor: int, offset: int, size: int) -> None:
    # macOS: struct radvisory { off_t ra_offset; int ra_count; }
    command: int = getattr(fcntl, "F_RDADVISE")  # noqa: B009 (only macOS' own types know it)
    fcntl.fcntl(descriptor, command, struct.pack("=qi4x", offset, size))


def _first(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the first `count` bytes of `parts`."""
    found = []
    for part in parts:
        found.append(part[:count])
        count -= len(found[-1])
    return found


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `parts` behind their first `count` bytes."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[index + 1 :]]
        count -= len(part)
    return []


@dataclass(frozen=True, slots=True)
class Span:
    """An aligned range of the file around one that was asked for."""

    begin: int
    length: int
    skip: int  # bytes of the span in front of what was asked for
    needed: int  # bytes of the span up to the end of what was asked for

    @classmethod
    def around(cls, offset: int, size: int, alignment: int) -> Self:
        """Round the range outwards."""
        skip = offset % alignment
        needed = skip + size
        return cls(offset - skip, -(-needed // alignment) * alignment, skip, needed)


class Arena:
    """`slots` pieces of page-aligned memory, each large enough for a record's span."""

    def __init__(self, slots: int, region: Region, alignment: int) -> None:
        block = max(alignment, mmap.PAGESIZE)
        # A span may start and end within a block.
        slot_bytes = -(-(region.record_bytes + 2 * alignment) // block) * block
        # Private, so that the system accounts for it as this process' own memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, slots * slot_bytes, flags=flags)
        whole = memoryview(memory)
        self.slots = [whole[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)]
        first = np.frombuffer(memory, np.uint8).ctypes.data
        self.addresses = [first + i * slot_bytes for i in range(slots)]
