"""A table with overlays over it: gives the same records, but for the rows they change.

A fetch goes through the table below, which reads, verifies and transcodes as ever; then the changed
rows of the buffer are overwritten. What lies on storage and in the record cache stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes, Floats
from edge_memllm.forking import ProcessLock
from edge_memllm.overlays.composing import Composer, Ids, WireRows
from edge_memllm.overlays.overlay import Overlay
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Fetched, TableStatistics

CACHE_BYTES = 16_000_000  # of rows that were composed
_BLOCK_VALUES = 1 << 18  # composed at a time: temporaries stay at a few MB


@dataclass(frozen=True, slots=True, eq=False)
class _Changed:
    """What becomes of one token's record."""

    layers: Ids
    rows: WireRows

    def write(self, scales: Bytes, codes: Bytes) -> None:
        """Overwrite the changed layers of a record, scales and codes [L, ...]."""
        scales[self.layers], codes[self.layers] = self.rows.scales, self.rows.codes

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes + self.rows.scales.nbytes + self.rows.codes.nbytes


class OverlaidTable:
    """A record source over another one. Thread-safe; it owns nothing that needs closing.

    `overlays` act in their order, each on what those before made. They must fit the model:
    `Overlay.check_fits` is the caller's business. `cache_bytes` bounds the memory for rows that
    were composed.
    """

    def __init__(
        self,
        table: RecordSource,
        overlays: Sequence[Overlay],
        vocab_size: int,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.layout = table.layout
        self.reader_name = table.reader_name
        self.reader_reason = table.reader_reason
        self._table = table
        self._composer = Composer(table.layout, overlays)
        self._touched = np.zeros(vocab_size, np.bool_)
        for overlay in overlays:
            tokens = overlay.entries.tokens
            for start in range(0, len(tokens), _BLOCK_VALUES):  # mapped, perhaps millions
                self._touched[tokens[start : start + _BLOCK_VALUES]] = True
        self._changed = _ChangedRecords(cache_bytes)
        layers, width = max(1, self.layout.layers), self.layout.width
        self._block = max(1, _BLOCK_VALUES // (layers * width))  # tokens

    @property
    def statistics(self) -> TableStatistics:
        """What the table below has read so far."""
        return self._table.statistics

    def locate(self, token: int) -> tuple[int, int]:
        """Return where the record of a token begins in the table's file, and its bytes."""
        return self._table.locate(token)

    def announce(self, ids: Iterable[int]) -> None:
        """Say that the records of `ids` will be fetched soon."""
        self._table.announce(ids)

    def fetch(self, ids: NDArray[np.int64], buffer: RecordBuffer) -> Fetched:
        """Fetch as the table does, then put the changed rows in their places.

        Raises as `Table.fetch`, and `RequestError` where an overlay makes values too large.
        """
        fetched = self._table.fetch(ids, buffer)
        slots = np.flatnonzero(self._touched[ids])
        if slots.size:
            self._change(ids, slots, buffer)
        return fetched

    def rows(self, ids: NDArray[np.int64]) -> Floats:
        """Return the decoded memory rows of `ids` [U] as float32 [U, L, D]."""
        buffer = RecordBuffer(self.layout, len(ids))
        self.fetch(ids, buffer)
        return buffer.rows(len(ids))

    def embeddings(self, ids: NDArray[np.int64]) -> Floats:
        """Return the embeddings of `ids` [U] as float32 [U, D]: overlays leave them alone."""
        return self._table.embeddings(ids)

    def _change(self, ids: Ids, slots: Ids, buffer: RecordBuffer) -> None:
        """Overwrite the changed rows of the records in `slots`."""
        scales, codes = buffer.wire_bytes(len(ids))
        missing = []
        for slot, token in zip(slots.tolist(), ids[slots].tolist(), strict=True):
            known = self._changed.get(token)
            if known is None:
                missing.append(slot)
            else:
                known.write(scales[slot], codes[slot])
        for start in range(0, len(missing), self._block):
            block = missing[start : start + self._block]
            tokens = ids[block]
            for slot, changed in self._compose(tokens, block, scales, codes):
                changed.write(scales[slot], codes[slot])
                self._changed.put(int(ids[slot]), changed)

    def _compose(
        self, tokens: Ids, slots: Sequence[int], scales: Bytes, codes: Bytes
    ) -> Iterator[tuple[int, _Changed]]:
        """Yield what becomes of each of the records that lie, as the table has them, in slots."""
        places, layers = self._composer.touched(tokens)
        at = np.array(slots)[places]
        base = WireRows(scales[at, layers], codes[at, layers])
        made = self._composer.compose(tokens, places, layers, base)
        ends = np.searchsorted(places, np.arange(len(slots) + 1)).tolist()
        for slot, start, end in zip(slots, ends, ends[1:], strict=False):
            rows = WireRows(made.scales[start:end].copy(), made.codes[start:end].copy())
            yield slot, _Changed(layers[start:end].copy(), rows)


class _ChangedRecords:
    """What was composed, by token, the last used kept: at most so many bytes. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._records: OrderedDict[int, _Changed] = OrderedDict()
        self._lock = ProcessLock()

    def get(self, token: int) -> _Changed | None:
        with self._lock:
            found = self._records.get(token)
            if found is not None:
                self._records.move_to_end(token)
            return found

    def put(self, token: int, changed: _Changed) -> None:
        with self._lock:
            if token in self._records:  # another thread was faster
                return
            self._records[token] = changed
            self._bytes += changed.nbytes
            while self._bytes > self._most:
                self._bytes -= self._records.popitem(last=False)[1].nbytes
