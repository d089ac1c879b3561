"""The reader contract: how records get from storage into memory.

A reader fills given byte ranges from given places of one open file. It owns that file, may be
called from several threads at once, and never returns with a range half filled. It knows where
records lie, and nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
