"""What int8, int6, int5 and int4 share: whole numbers around a zero point."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, CodecSizes, Floats, Wire
from edge_memllm.codecs.grouped import GroupedCodec, Halves, in_steps, steps_around
from edge_memllm.codecs.packing import pack, unpack

_WIRE_ZERO = 128


class UniformCodec(GroupedCodec):
    """value = (code - zero) * scale, zero being half of all codes."""

    miss = 0.5

    def __init__(self, group: int) -> None:
        super().__init__(f"int{self.bits}", group)
        self._zero = 1 << (self.bits - 1)

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        return self.wire_sizes(layers, width)

    def _codes(self, groups: Floats, scales: Halves, clip: bool) -> Bytes:
        codes = in_steps(groups, scales)
        codes += 0.5 + self._zero  # truncation then rounds
        if clip:
            np.clip(codes, 0.5, 2 * self._zero - 0.5, out=codes)
        return codes.astype(np.uint8)

    def _levels_of(self, codes: Bytes) -> Floats:
        levels = codes.astype(np.float32)
        levels -= self._zero
        return levels


class PackedUniformCodec(UniformCodec):
    """Codes that the graph is not fed as they are stored: packed, and around a zero of their own.

    They reach a step further below zero than above, so the scale may be negative, as in `int4`.
    """

    wire: Wire = "q8"
    transcodes = True

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        fed = self.wire_sizes(layers, width)
        return CodecSizes(fed.scales_bytes, fed.codes_bytes * self.bits // 8)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Unpack the codes and move their zero."""
        out_scales[:] = scales
        np.add(unpack(codes, self.bits), np.uint8(_WIRE_ZERO - self._zero), out=out_codes)

    def _steps(self, groups: Floats) -> Floats:
        return steps_around(groups, self._zero, self._zero - 1)

    def _pack(self, codes: Bytes) -> Bytes:
        return pack(codes, self.bits)
