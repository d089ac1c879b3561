"""mmap: records are copied out of a memory map. Opt-in, for one reason: errors.

When the device fails or the file is cut short under a map, the system kills the process (SIGBUS),
and no Python code can prevent that. The size is checked before each batch, which catches most cuts
cleanly, but never an error of the device.

ram: the records are read into memory once, and every fetch is a copy from there.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from edge_memllm.errors import StorageError
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.reader import ASKED_FOR, OpenFile, Region, scatter

# Records the system is told of ahead of the one that is copied.
_AHEAD = 64

_CHUNK_BYTES = 16 << 20


class MmapReader:
    """Maps the file up to the end of the records. Raises `StorageError` when that is refused."""

    name = "mmap"

    def __init__(self, file: int, where: str, region: Region) -> None:
        self.reason = ASKED_FOR
        self._file = OpenFile(file, where)
        self._end = region.end
        try:
            self._check_size()
            self._map = mmap.mmap(file, region.end, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            self._file.close()
            raise StorageError(
                f"{where}: {region.end} bytes cannot be mapped ({error}). Use the reader 'pread'."
            ) from error
        except StorageError:
            self._file.close()
            raise
        self._bytes = memoryview(self._map)
        self._can_advise = hasattr(mmap, "MADV_WILLNEED")
        if hasattr(mmap, "MADV_RANDOM"):
            # Without it a single fault may read megabytes ahead.
            self._map.madvise(mmap.MADV_RANDOM)

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Copy each target from its offset; returns one read for each."""
        self._check_size()
        announced = 0
        for index, (offset, parts) in enumerate(zip(offsets, targets, strict=True)):
            # Also for a single record: else each of its pages would be a fault of its own.
            while announced < min(index + _AHEAD, len(offsets)):
                self._announce(offsets[announced], sum(map(len, targets[announced])))
                announced += 1
            scatter(self._bytes, offset, parts)
        return len(offsets)

    def announce(self, offsets: Sequence[int], size: int) -> None:
        """Have the system read the ranges into its page cache."""
        for offset in offsets:
            self._announce(offset, size)

    def close(self) -> None:
        """Unmap and close the file; closing twice is fine."""
        self._bytes.release()
        self._map.close()
        self._file.close()

    def _announce(self, offset: int, size: int) -> None:
        if self._can_advise:
            begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, offset + size - begin)

    def _check_size(self) -> None:
        size = self._file.size()
        if size < self._end:
            raise self._file.cut_short(size, self._end - size)


class RamReader:
    """Holds the whole region of the file; the file is closed once it is loaded.

    Raises `StorageError` when the records do not fit into memory or cannot be read.
    """

    name = "ram"

    def __init__(self, file: int, where: str, region: Region) -> None:
        self.reason = ASKED_FOR
        self._where = where
        self._start = region.start
        storage = PreadReader(file, where)
        try:
            self._records = memoryview(bytearray(region.size))
            for position in range(0, region.size, _CHUNK_BYTES):
                chunk = self._records[position : position + _CHUNK_BYTES]
                storage.read([region.start + position], [[chunk]])
        except MemoryError:
            raise StorageError(
                f"{where}: the records need {region.size} bytes of memory, which are not there. "
                "Use the reader 'pread'."
            ) from None
        finally:
            storage.close()

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Copy each target from its offset; returns 0, for nothing is read from storage."""
        if not self._records:
            raise StorageError(f"{self._where}: the reader is closed.")
        for offset, parts in zip(offsets, targets, strict=True):
            scatter(self._records, offset - self._start, parts)
        return 0

    def announce(self, offsets: Sequence[int], size: int) -> None:
        """Do nothing: everything is in memory."""

    def close(self) -> None:
        """Free the memory."""
        self._records = memoryview(b"")
