"""mmap: records are copied out of a memory map. Opt-in, for one reason: errors.

When the device fails or the file is cut short under a map, the system kills the process (SIGBUS),
and no Python code can prevent that. The size is checked before each batch, which catches most cuts
cleanly, but never an error of the device.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from edge_memllm.errors import StorageError
from edge_memllm.readers.open_file import OpenFile
from edge_memllm.readers.reader import ASKED_FOR, Region, scatter

# Records the system is told of ahead of the one that is copied.
_AHEAD = 64


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
