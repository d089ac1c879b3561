"""Rows that are gates: which questions they answer and which not, and how they are turned off.

    added = norm(W_u (f(W_g x) * (c + row))) * gain     c: what a projection makes of the embedding

A row is multiplied with, so that no direction of it is one of the stream; c stays when rows are
blank; and the norm takes back the size of the product, so that a gain acts behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edge_memllm.arrays import Ids
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.errors import RequestError
from edge_memllm.overlays.table import plain_codec
from edge_memllm.table.source import Fetched, RecordSource

OFF = (
    "Rows of this model are gates: a layer multiplies what it computes with them. With memory off "
    "they are blank, and what a projection of the embedding adds to a gate stays."
)
NO_READING = (
    "What rows promote is left out: a gate is multiplied with, not added to the stream, so the "
    "head cannot read it."
)
NO_PARTS = "The parts of a logit are left out: a gate adds nothing to it by itself."
GAINS = (
    "What all layers add through their gates multiplied by one number, behind the norm that "
    "follows; rows stay as they are, and nothing is trained again."
)


def are_gates(memory: MemorySpec) -> bool:
    """Whether rows gate what is computed, instead of being added to the stream."""
    return memory.kind == "gate"


def no_keys() -> RequestError:
    """Return why there are neither keys nor coefficients."""
    return RequestError(
        "Rows of this model are gates that were trained themselves: no FFN-M makes them, so there "
        "are no keys. --similar and --clusters compare the rows."
    )


def refuse_directions(memory: MemorySpec) -> None:
    """Raise `RequestError` for rows that add nothing that could be taken away."""
    if are_gates(memory):
        raise RequestError(
            "Rows of this model are gates: they are multiplied with, not added to the stream, so "
            "what they promote can neither be read off them nor be taken away. Change rows by "
            "'edge-memllm overlay edit' (--blank, --like) and see what that does."
        )


class BlankRows(RecordSource):
    """The records of another source, the rows of some layers zero."""

    def __init__(self, source: RecordSource, layers: Sequence[int]) -> None:
        self.layout = source.layout
        self.reader_name = source.reader_name
        self._source = source
        self._layers = list(layers)
        zeros = np.zeros((1, 1, source.layout.width), np.float32)
        self._zero = plain_codec(source.layout).encode(zeros)

    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon."""
        self._source.announce(ids)

    def fetch(self, ids: Ids, buffer: RecordBuffer) -> Fetched:
        """Fetch as the source does, then blank rows. Raises as it does."""
        fetched = self._source.fetch(ids, buffer)
        for fed, zero in zip(buffer.wire_bytes(len(ids)), self._zero, strict=True):
            fed[:, self._layers] = zero
        return fetched
