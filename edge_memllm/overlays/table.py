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

from edge_memllm.arrays import Bytes, Floats, Ids
from edge_memllm.artifact.layout import RecordBuffer, TableLayout
from edge_memllm.codecs import Codec, UnencodableRowError, get_codec
from edge_memllm.codecs.wire import decode_wire
from edge_memllm.errors import RequestError
from edge_memllm.overlays.overlay import OPERATIONS, Overlay
from edge_memllm.process.forking import ProcessLock
from edge_memllm.table.source import Fetched, RecordSource

_LARGEST_SCALE = 65504.0  # of a float16

CACHE_BYTES = 16_000_000  # of rows that were composed
_BLOCK_VALUES = 1 << 18  # composed at a time: temporaries stay at a few MB


@dataclass(frozen=True, slots=True, eq=False)
class WireRows:
    """Rows of one layer each, as the graph is fed them: m of them."""

    scales: Bytes  # [m, scales of a layer]
    codes: Bytes  # [m, codes of a layer]


class Composer:
    """Composes rows for one layout, by a stack of overlays, the first of which acts first."""

    def __init__(self, layout: TableLayout, overlays: Sequence[Overlay]) -> None:
        self._overlays = tuple(overlays)
        self._codec = plain_codec(layout)
        self._width = layout.width
        scales, codes = self._codec.encode(np.zeros((1, 1, layout.width), np.float32))
        self._zero = WireRows(np.zeros_like(scales), codes)  # a scale of -0 would be zero too

    def touched(self, tokens: Ids) -> tuple[Ids, Ids]:
        """Return which rows of tokens [U] any overlay changes: their places [m] and layers [m].

        Sorted by place, then layer.
        """
        keys = [self._keys(overlay, tokens)[0] for overlay in self._overlays]
        found = np.unique(np.concatenate(keys)) if keys else np.empty(0, np.int64)
        return found >> 16, found & 0xFFFF

    def compose(self, tokens: Ids, places: Ids, layers: Ids, base: WireRows) -> WireRows:
        """Return what becomes of the rows `base` [m] that `touched` named for tokens [U].

        Raises `RequestError` where a value is too large for the wire form.
        """
        rows = _Rows(self._codec, self._width, base)
        wanted = (places << 16) | layers
        for overlay in self._overlays:
            keys, entries = self._keys(overlay, tokens)
            at = np.searchsorted(wanted, keys)
            operations = overlay.entries.operations[entries]
            for number, operation in enumerate(OPERATIONS):
                of = operations == number
                if of.any():
                    self._apply(rows, overlay, operation, at[of], entries[of])
        try:
            return rows.encoded()
        except UnencodableRowError as error:
            row = error.row
            names = ", ".join(f"'{overlay.name}'" for overlay in self._overlays)
            raise RequestError(
                f"Overlays {names}: token {tokens[places[row]]}, layer {layers[row]}: "
                f"{error.reason}. Scale it less, or use a table whose codec holds larger values."
            ) from error

    def _keys(self, overlay: Overlay, tokens: Ids) -> tuple[Ids, Ids]:
        """Return place and layer in one number [m], and the entry of each [m]."""
        entries, owners = overlay.find(tokens)
        return (owners << 16) | overlay.entries.layers[entries], entries

    def _apply(self, rows: _Rows, overlay: Overlay, operation: str, at: Ids, entries: Ids) -> None:
        places = overlay.entries.places[entries]
        match operation:
            case "replace" if overlay.spec.codec == self._codec.id:
                rows.put(at, WireRows(*overlay.stored_rows(places)))
            case "replace":
                rows.put_values(at, overlay.decoded_rows(places))
            case "add":
                rows.put_values(at, rows.values(at) + overlay.decoded_rows(places))
            case "scale":
                rows.factors[at] *= overlay.entries.factors[entries]
            case "blank":
                rows.put(at, self._zero)


class _Rows:
    """m rows under way, each times its factor: wire bytes, or values where `loose`."""

    def __init__(self, codec: Codec, width: int, base: WireRows) -> None:
        self._codec = codec
        self._width = width
        self._scales, self._codes = base.scales.copy(), base.codes.copy()
        self._values = np.empty((len(base.codes), width), np.float32)  # of loose ones only
        self._loose = np.zeros(len(base.codes), np.bool_)
        self.factors = np.ones(len(base.codes), np.float32)

    def put(self, at: Ids, rows: WireRows) -> None:
        """Set rows to wire bytes."""
        self._scales[at], self._codes[at] = rows.scales, rows.codes
        self._loose[at], self.factors[at] = False, 1

    def put_values(self, at: Ids, values: Floats) -> None:
        """Set rows to values [n, D]."""
        self._values[at] = values
        self._loose[at], self.factors[at] = True, 1

    def values(self, at: Ids) -> Floats:
        """Return rows as float32 [n, D]."""
        values = self._values[at]
        stored = ~self._loose[at]
        wire = (self._scales[at][stored], self._codes[at][stored])
        values[stored] = decode_wire(self._codec.wire, *wire, self._codec.group)
        values *= self.factors[at, None]
        return values

    def encoded(self) -> WireRows:
        """Return all rows as wire bytes. Raises `UnencodableRowError` for what is too large."""
        scaled = ~self._loose & (self.factors != 1)
        if self._codec.group is not None:  # codes stay: only what they are multiplied with changes
            self._multiply_scales(np.flatnonzero(scaled))
            scaled = self._loose
        at = np.flatnonzero(scaled | self._loose)
        try:
            scales, codes = self._codec.encode(self.values(at)[:, None])
        except UnencodableRowError as error:
            raise UnencodableRowError(int(at[error.row]), 0, error.reason) from error
        self._scales[at], self._codes[at] = scales, codes
        return WireRows(self._scales, self._codes)

    def _multiply_scales(self, at: Ids) -> None:
        scales = self._scales[at].view("<f2") * self.factors[at, None]
        large = ~(np.abs(scales) <= _LARGEST_SCALE).all(axis=1)
        if large.any():
            row = int(at[large.argmax()])
            reason = f"scaled by {self.factors[row]:g} it is too large for {self._codec.id}"
            raise UnencodableRowError(row, 0, reason)
        self._scales[at] = scales.astype("<f2").view(np.uint8)


def plain_codec(layout: TableLayout) -> Codec:
    """Return the codec that stores the wire form of a layout's rows as it is fed."""
    match layout.wire:
        case "q8" | "q4":
            return get_codec(f"int{layout.wire[1]}-g{layout.group}")
        case plain:
            return get_codec(plain)


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


class OverlaidTable(RecordSource):
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
