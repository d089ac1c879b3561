"""The codec contract: how the memory rows of one token become bytes of a record, and back.

A codec turns float rows [N, L, D] into two byte arrays per record: `scales` (empty for codecs
without groups) and `codes`. The bytes are exactly what the graph is fed (the wire form), so a
record read from storage needs no conversion. Everything that changes the bytes is in the id.
Numbers are little-endian; groups of G values run along D, so they never cross a layer.
A codec knows nothing of records, files or models.

Wire forms, as arrays over U records:
    none    nothing
    f32     codes are float32 [U, L*D]
    f16     codes are float16 [U, L*D]
    q8      codes are uint8 [U, L*D]; value = (code - 128) * scale
    q4      codes are uint8 [U, L*D/2], low nibble first; value = (nibble - 8) * scale
    with    scales as float16 [U, L*D/G] for q8 and q4, one per group
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Wire = Literal["none", "f32", "f16", "q8", "q4"]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Rows are encoded in blocks of about this many values: temporaries stay in the cache, and memory
# beyond input and output stays at a few MB however large the chunk is.
_BLOCK_VALUES = 1 << 18


@dataclass(frozen=True, slots=True)
class CodecSizes:
    """Bytes that one record spends on scales and on codes."""

    scales_bytes: int
    codes_bytes: int


class UnencodableRowError(ValueError):
    """A value has no encoding: NaN, infinite, or too large. Carries its row and layer."""

    def __init__(self, row: int, layer: int, reason: str) -> None:
        super().__init__(f"row {row}, layer {layer}: {reason}")
        self.row = row
        self.layer = layer
        self.reason = reason


class Codec(ABC):
    """One way to store rows. Instances are immutable and shared; see the module docstring."""

    id: str
    wire: Wire
    group: int | None = None
    limit: float  # the largest magnitude that can be encoded

    @abstractmethod
    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` for a shape this codec cannot store."""

    @abstractmethod
    def bound(self, rows: Floats) -> Floats:
        """Return the largest error allowed for each value of `rows`, broadcastable to its shape.

        `abs(decode(encode(rows)) - rows) <= bound(rows)` always holds.
        """

    @abstractmethod
    def _encode(self, rows: Floats) -> tuple[Bytes, Bytes]:
        """Encode contiguous rows [n, L, D] whose magnitudes are within the limit."""

    @abstractmethod
    def _decode(self, scales: Bytes, codes: Bytes, layers: int, width: int) -> Floats:
        """Decode contiguous arrays whose shapes are already checked."""

    def encode(self, rows: Floats) -> tuple[Bytes, Bytes]:
        """Encode rows [N, L, D] as scales [N, scales_bytes] and codes [N, codes_bytes].

        Raises `UnencodableRowError` (a `ValueError`) for NaN, infinite and too large values,
        naming row and layer.
        """
        count, layers, width = rows.shape
        sizes = self.sizes(layers, width)
        scales = np.empty((count, sizes.scales_bytes), np.uint8)
        codes = np.empty((count, sizes.codes_bytes), np.uint8)
        step = max(1, _BLOCK_VALUES // max(1, layers * width))
        for start in range(0, count, step):
            part = slice(start, start + step)
            block = np.ascontiguousarray(rows[part], np.float32)
            self._check_magnitudes(block, start)
            scales[part], codes[part] = self._encode(block)
        return scales, codes

    def decode(self, scales: Bytes, codes: Bytes, layers: int, width: int) -> Floats:
        """Decode scales [N, scales_bytes] and codes [N, codes_bytes] to float32 [N, L, D].

        Raises `ValueError` when the arrays do not have these sizes.
        """
        sizes = self.sizes(layers, width)
        expected = ((len(codes), sizes.scales_bytes), (len(codes), sizes.codes_bytes))
        if (scales.shape, codes.shape) != expected:
            raise ValueError(
                f"codec {self.id}: scales {scales.shape} and codes {codes.shape}, "
                f"expected {expected[0]} and {expected[1]} for {layers} layers of {width}."
            )
        return self._decode(
            np.ascontiguousarray(scales), np.ascontiguousarray(codes), layers, width
        )

    def _check_magnitudes(self, rows: Floats, start: int) -> None:
        storable = np.abs(rows) <= self.limit  # False for NaN
        if not storable.all():
            row, layer, column = np.argwhere(~storable)[0].tolist()
            value = float(rows[row, layer, column])
            raise UnencodableRowError(
                start + row,
                layer,
                f"{value:g} cannot be stored, codec {self.id} holds magnitudes "
                f"up to {self.limit:g}",
            )
