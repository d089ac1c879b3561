"""Where the record of each token lies in the table file.

Records are all alike, or lie class after class with a stride of each class. Knows arithmetic;
nothing of files or of what is in a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_memllm.readers import Region
from edge_memllm.records import RecordLayout

PLACE_BYTES = 9  # of memory for each token, where classes of tokens differ
# For token ids: where their records begin in the file, and which variants of the layout they are.
Places = Callable[[Sequence[int]], tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True)
class Section:
    """Records that are alike, one behind the other."""

    start: int  # in the file
    layout: RecordLayout
    count: int
    first: int  # how many records lie in sections before

    @property
    def end(self) -> int:
        """The first byte behind the records."""
        return self.start + self.count * self.layout.stride


def sections(layout: RecordLayout, vocab_size: int, start: int) -> Iterator[Section]:
    """Return the sections of a table whose records begin at byte `start`, in their order."""
    first = 0
    for variant, count in zip(layout.variants, layout.counts(vocab_size), strict=True):
        section = Section(start, variant, count, first)
        yield section
        start, first = section.end, first + count


def record_region(layout: RecordLayout, vocab_size: int, start: int, most: int) -> Region:
    """Return where readers find records, of each of which at most `most` bytes are read."""
    stride = layout.stride if layout.codec.classes is None else layout.alignment
    return Region(start, layout.records_bytes(vocab_size), most, stride)


def record_places(layout: RecordLayout, vocab_size: int, start: int) -> Places:
    """Return the function that finds the records of tokens; ids must be in the vocabulary.

    Takes `PLACE_BYTES` of memory per token where classes of tokens differ, nothing otherwise.
    """
    if layout.codec.class_of is None:
        stride = layout.stride
        return lambda tokens: ([start + token * stride for token in tokens], [0] * len(tokens))
    offsets = np.empty(vocab_size, np.int64)
    order = layout.stored_order(vocab_size)
    for each in sections(layout, vocab_size, start):
        tokens = order[each.first : each.first + each.count]
        offsets[tokens] = np.arange(each.start, each.end, each.layout.stride)
    offset_of, class_of = offsets.data, layout.codec.class_of.data
    return lambda tokens: (
        [offset_of[token] for token in tokens],
        [class_of[token] for token in tokens],
    )
