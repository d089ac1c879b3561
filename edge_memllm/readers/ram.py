"""ram: the records are read into memory once, and every fetch is a copy from there."""

from __future__ import annotations

from collections.abc import Sequence

from edge_memllm.errors import StorageError
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.reader import ASKED_FOR, Region, scatter

_CHUNK_BYTES = 16 << 20


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
