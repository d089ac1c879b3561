"""pread: one positioned read per record, scattered straight into place. The default.

Errors and truncation come back as return values, which a memory map would turn into a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from edge_memllm.errors import StorageError

# Records announced to the system before the first of them is read: the device works on them side
# by side, and what is announced but not yet read stays at a few MB.
_ANNOUNCED = 64


class PreadReader:
    """Reads with `os.preadv`; where the system lacks it, with seek and read under a lock."""

    name = "pread"

    def __init__(self, file: int, where: str) -> None:
        self._where = where
        self._stream = os.fdopen(file, "rb", buffering=0)
        self._file = file
        self._lock = threading.Lock()
        self._read_once = self._positioned if hasattr(os, "preadv") else self._seeking
        self._can_announce = hasattr(os, "posix_fadvise")
        if self._can_announce:
            # Records are scattered: reading ahead past one would only waste bandwidth.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Fill each target from its offset; see `Reader.read`."""
        calls = 0
        for start in range(0, len(offsets), _ANNOUNCED):
            part = slice(start, start + _ANNOUNCED)
            if len(offsets) > 1 and self._can_announce:
                self._announce(offsets[part], targets[part])
            for offset, parts in zip(offsets[part], targets[part], strict=True):
                calls += self._fill(offset, parts)
        return calls

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _announce(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> None:
        for offset, parts in zip(offsets, targets, strict=True):
            size = sum(map(len, parts))
            os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_WILLNEED)

    def _fill(self, offset: int, parts: list[memoryview]) -> int:
        calls = 0
        missing = sum(map(len, parts))
        while missing:
            try:
                count = self._read_once(parts, offset)
            except OSError as error:
                raise StorageError(
                    f"{self._where}: reading {missing} bytes at {offset} failed "
                    f"({error.strerror}). Check the storage device."
                ) from error
            if count == 0:
                raise StorageError(
                    f"{self._where}: the file ends at {offset}, {missing} bytes early. It was cut "
                    "short while in use; copy the folder again."
                )
            calls, offset, missing = calls + 1, offset + count, missing - count
            if missing:
                parts = _without(parts, count)
        return calls

    def _positioned(self, parts: list[memoryview], offset: int) -> int:
        return os.preadv(self._file, parts, offset)

    def _seeking(self, parts: list[memoryview], offset: int) -> int:
        with self._lock:
            self._stream.seek(offset)
            return self._stream.readinto(parts[0]) or 0


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `parts` behind their first `count` bytes."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[index + 1 :]]
        count -= len(part)
    return []
