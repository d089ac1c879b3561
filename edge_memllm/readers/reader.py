"""The reader contract: how records get from storage into memory.

A reader fills given byte ranges from given places of one open file. It owns that file, may be
called from several threads at once, and never returns with a range half filled. It knows nothing
of records, codecs or checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Reader(Protocol):
    """One way to read."""

    name: str

    def read(self, offsets: Sequence[int], targets: Sequence[list[memoryview]]) -> int:
        """Fill `targets[i]`, range after range, with the bytes from `offsets[i]` of the file on.

        Returns the number of calls to the system that read from storage. Raises `StorageError`
        when reading fails or the file is too short.
        """

    def close(self) -> None:
        """Give up the file and the memory. The reader must not be used any more."""
