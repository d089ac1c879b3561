"""pread: one positioned read per record, scattered straight into place. The default.

The system's page cache is the cache. Errors and truncation come back as return values, which a
memory map would turn into a crash.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_memllm.readers.reader import ASKED_FOR, OpenFile

# Records announced ahead of the one that is read: the device works on them side by side, and what
# is announced but not yet read stays at a few MB.
_AHEAD = 64


class PreadReader:
    """Reads with `os.preadv`; where the system lacks it, with seek and read under a lock."""

    name = "pread"

    def __init__(self, file: int, where: str) -> None:
        self.reason = ASKED_FOR
        self._file = OpenFile(file, where)
        self._file.expect_random_reads()

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Fill each target from its offset; see `Reader.read`."""
        if len(offsets) == 1:
            return self._file.fill(targets[0], offsets[0])
        calls = 0
        announced = 0
        for index, (offset, parts) in enumerate(zip(offsets, targets, strict=True)):
            while announced < min(index + _AHEAD, len(offsets)):
                self._file.announce(offsets[announced], sum(map(len, targets[announced])))
                announced += 1
            calls += self._file.fill(parts, offset)
        return calls

    def announce(self, offsets: Sequence[int], size: int) -> None:
        """Have the system read the ranges into its page cache."""
        for offset in offsets:
            self._file.announce(offset, size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
