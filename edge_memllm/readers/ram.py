"""ram: the records are read into memory once, and every fetch is a copy from there."""

from __future__ import annotations

from collections.abc import Sequence

from edge_memllm.errors import StorageError
from edge_memllm.readers.pread import PreadReader

_CHUNK_BYTES = 16 << 20


class RamReader:
    """Holds bytes [start, start + size) of the file; the file is closed once they are loaded.

    Raises `StorageError` when they do not fit into memory or cannot be read.
    """

    name = "ram"

    def __init__(self, file: int, where: str, start: int, size: int) -> None:
        storage = PreadReader(file, where)
        try:
            self._region = memoryview(bytearray(size))
            for position in range(0, size, _CHUNK_BYTES):
                chunk = self._region[position : position + _CHUNK_BYTES]
                storage.read([start + position], [[chunk]])
        except MemoryError:
            raise StorageError(
                f"{where}: the records need {size} bytes of memory, which are not there. "
                "Use the reader 'pread'."
            ) from None
        finally:
            storage.close()
        self._start = start

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Copy each target from its offset; returns 0, for nothing is read from storage."""
        for offset, parts in zip(offsets, targets, strict=True):
            position = offset - self._start
            for part in parts:
                part[:] = self._region[position : position + len(part)]
                position += len(part)
        return 0

    def close(self) -> None:
        """Free the memory."""
        self._region = memoryview(b"")
