"""What overlays make of rows: row = op_n(... op_1(row of the table)), in the form a graph is fed.

Bytes stay bytes as long as they can: a row replaced by one in the same form is copied, a scaled one
keeps its codes, a blank one is exactly zero. The rest is computed in float32 and encoded by the
plain codec of the wire form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs import Codec, UnencodableRowError, get_codec
from edge_memllm.codecs.codec import Bytes, Floats
from edge_memllm.codecs.wire import decode_wire
from edge_memllm.errors import RequestError
from edge_memllm.overlays.overlay import OPERATIONS, Overlay
from edge_memllm.records import RecordLayout

Ids = NDArray[np.int64]

_LARGEST_SCALE = 65504.0  # of a float16


@dataclass(frozen=True, slots=True, eq=False)
class WireRows:
    """Rows of one layer each, as the graph is fed them: m of them."""

    scales: Bytes  # [m, scales of a layer]
    codes: Bytes  # [m, codes of a layer]


class Composer:
    """Composes rows for one layout, by a stack of overlays, the first of which acts first."""

    def __init__(self, layout: RecordLayout, overlays: Sequence[Overlay]) -> None:
        self._overlays = tuple(overlays)
        self._codec = plain_codec(layout.codec)
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


def plain_codec(codec: Codec) -> Codec:
    """Return the codec that stores the wire form of another as it is fed."""
    match codec.wire:
        case "q8" | "q4":
            return get_codec(f"int{codec.wire[1]}-g{codec.group}")
        case plain:
            return get_codec(plain)
