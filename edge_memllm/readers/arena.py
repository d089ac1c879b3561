"""Memory for reads that bypass the page cache: pages of its own, cut into equal slots.

Such reads want place, length and memory aligned to the device's blocks, so they cover a little more
than was asked for. Knows arithmetic and memory; knows nothing of files.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Self

import numpy as np

from edge_memllm.readers.reader import Region


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
