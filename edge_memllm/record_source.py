"""Where records come from, as far as generating knows: a table, or a table with something over it.

The seam between whoever feeds a runtime and whatever holds the records.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Floats
from edge_memllm.records import RecordBuffer, RecordLayout
from edge_memllm.table import Fetched, TableStatistics


class RecordSource(Protocol):
    """Gives records by token id; `edge_memllm.table.Table` says what each of these does."""

    @property
    def layout(self) -> RecordLayout:
        """How the records that are read are laid out."""

    @property
    def reader_name(self) -> str:
        """The reader that brings them from storage."""

    @property
    def reader_reason(self) -> str:
        """Why it is that reader."""

    @property
    def statistics(self) -> TableStatistics:
        """What was read so far."""

    def locate(self, token: int) -> tuple[int, int]:
        """Return where the record of a token begins in the file, and its bytes."""

    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon."""

    def fetch(self, ids: NDArray[np.int64], buffer: RecordBuffer) -> Fetched:
        """Put the record of `ids[i]` into slot i of `buffer`."""

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """Return the decoded memory rows of `ids` [U] as float32 [U, L, D]."""

    def embeddings(self, ids: NDArray[np.int64]) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D]."""
