"""What an allocation is to come to: bits per memory value, or bytes of the table file.

Both count exactly what is written. Knows layouts, nothing of how an allocation is found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_memllm.mixed_precision.class_forms import Room
from edge_memllm.records import RecordLayout
from edge_memllm.table_header import build_header

_WORD = re.compile(r"mixed-(\d+(?:\.\d+)?)")
_ANY_IDENTITY = "sha256:" + 64 * "0"


@dataclass(frozen=True, slots=True)
class Target:
    """One of the two: `bits` per memory value, or `file_bytes`."""

    bits: float | None = None
    file_bytes: int | None = None

    def __str__(self) -> str:
        return self._shown(self.file_bytes or 0) if self.bits is None else f"{self.bits:g} bits"

    def limit(self, layout: RecordLayout, vocab_size: int) -> int:
        """Return the bytes that `taken` may come to."""
        if self.bits is None:
            return self.file_bytes or 0
        return int(self.bits * vocab_size * layout.layers * layout.width / 8)

    def taken(self, layout: RecordLayout, vocab_size: int) -> int:
        """Return what a table takes: the whole file; or scales, codes and parameters alone."""
        if self.bits is None:
            header = len(build_header(layout, vocab_size, _ANY_IDENTITY))
            return header + layout.table_bytes(vocab_size)
        each = zip(layout.counts(vocab_size), layout.variants, strict=True)
        records = sum(count * (one.scales_bytes + one.codes_bytes) for count, one in each)
        return records + layout.parameters_bytes

    def room(self, layout: RecordLayout) -> Room:
        """Return what counts of a record besides its memory values."""
        if self.bits is None:
            return Room(layout.embedding_bytes, layout.alignment)
        return Room(0, 1)

    def described(self, taken: int, layout: RecordLayout, vocab_size: int) -> str:
        """Return what is taken in the unit of this target."""
        if self.bits is None:
            return self._shown(taken)
        return f"{8 * taken / (vocab_size * layout.layers * layout.width):.3f} bits"

    def _shown(self, size: int) -> str:
        return f"{size:,} bytes"


def target_of(word: str) -> Target | None:
    """Return the target that a word such as `mixed-4.5` stands for, None for other words."""
    found = _WORD.fullmatch(word)
    return None if found is None else Target(bits=float(found[1]))
