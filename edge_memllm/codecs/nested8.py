"""nested8: int8 in two halves, the front one of which is an int4 of its own.

A code is 16 * high + low with both between -8 and 7. Scales and high parts come first: whoever
reads no further has rounded values at half the bytes.
"""

from __future__ import annotations

import numpy as np

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import Codec
from edge_memllm.codecs.grouped import GroupedCodec, Halves, in_steps, steps_around
from edge_memllm.codecs.wire import CodecSizes, Wire, pack_nibbles, unpack_nibbles

_LONG, _SHORT = 128, 119  # codes reach from -128 to 119 = 16 * 7 + 7
_ZERO = 128  # of the wire form


class Nested8Codec(GroupedCodec):
    """value = (16 * high + low) * scale; both stored plus 8, high nibbles of all layers first."""

    wire: Wire = "q8"
    transcodes = True
    bits = 8
    largest_level = _SHORT
    miss = 0.5

    def __init__(self, group: int) -> None:
        super().__init__("nested8", group)
        self._coarse = CoarseCodec(self.id, group)

    @property
    def coarse(self) -> Codec:
        """What reads scales and high parts alone."""
        return self._coarse

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        return self.wire_sizes(layers, width)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Put the halves together."""
        high, low = np.split(codes, 2, axis=1)
        self._coarse.transcode(scales, high, out_scales, out_codes)
        out_codes += unpack_nibbles(low)  # from 0, 16, ... 240
        out_codes -= np.uint8(8)

    def _steps(self, groups: Floats) -> Floats:
        return steps_around(groups, _LONG, _SHORT)

    def _codes(self, groups: Floats, scales: Halves, clip: bool) -> Bytes:
        codes = in_steps(groups, scales)
        codes += 0.5 + _ZERO  # truncation then rounds
        return codes.astype(np.uint8)

    def _levels_of(self, codes: Bytes) -> Floats:
        return codes.astype(np.float32) - _ZERO

    def _pack(self, codes: Bytes) -> Bytes:
        raised = codes + np.uint8(8)  # to 0 ... 255: both nibbles are plus 8 already
        high, low = raised >> np.uint8(4), raised & np.uint8(15)
        return np.concatenate([pack_nibbles(high), pack_nibbles(low)], axis=1)


class CoarseCodec(Codec):
    """The front part of nested8: value = 16 * high * scale. Reads only; nothing is written so."""

    wire: Wire = "q8"
    transcodes = True
    limit = Nested8Codec.largest_level * 65504.0

    def __init__(self, full_id: str, group: int) -> None:
        self.group: int = group
        self.id = f"{full_id}, coarse"

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes of the front part."""
        self._check_group(width)
        fed = self.wire_sizes(layers, width)
        return CodecSizes(fed.scales_bytes, fed.codes_bytes // 2)

    def bound(self, rows: Floats) -> Floats:
        """Return 8.5 steps, 8 of them for the low part: 17 times the bound of nested8."""
        return Nested8Codec(self.group).bound(rows) * np.float32(17)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Take the low parts for zero."""
        out_scales[:] = scales
        np.left_shift(unpack_nibbles(codes), np.uint8(4), out=out_codes)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        scales, codes = Nested8Codec(self.group).encode(rows)
        return scales, np.split(codes, 2, axis=1)[0]
