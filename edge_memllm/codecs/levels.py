"""What codecs with uneven levels share: a short table of whole numbers, which the graph is fed.

The levels lie between -128 and 127, so that a value in the wire form q8 is one lookup away and
has the same scale: transcoding is exact.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from edge_memllm.codecs.codec import Bytes, CodecSizes, Floats, Wire
from edge_memllm.codecs.grouped import GroupedCodec, Halves, extremes, in_steps
from edge_memllm.codecs.packing import pack, unpack

_ZERO = 128  # of the wire form
_FACTORS = (0.85, 0.88, 0.91, 0.94, 0.97)  # a search tries scales that much smaller


class LevelsCodec(GroupedCodec):
    """value = levels[code] * scale, where the value farthest from zero is at the farthest level.

    The scale is negative where that value and that level are on different sides of zero.
    """

    wire: Wire = "q8"
    transcodes = True

    def __init__(
        self, name: str, group: int, levels: tuple[int, ...], smallest_factor: float
    ) -> None:
        """Take ascending levels, a power of two of them, and how much a search may shrink scales.

        A value may then lie beyond the last level of its side, as `miss` says.
        """
        self.levels = levels
        ends = -levels[0], levels[-1]
        self.bits = len(levels).bit_length() - 1
        self.largest_level = max(ends)
        gap = max(high - low for low, high in pairwise(levels))
        self.miss = max(gap / 2, max(ends) - smallest_factor * min(ends))
        self.factors = tuple(each for each in _FACTORS if each >= smallest_factor)
        self._side = np.sign(ends[1] - ends[0])
        self._table = np.array(levels, np.float32)
        self._middles = np.array([(low + high) / 2 for low, high in pairwise(levels)], np.float32)
        self._wire_codes = (np.array(levels) + _ZERO).astype(np.uint8)
        super().__init__(name, group)

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        fed = self.wire_sizes(layers, width)
        return CodecSizes(fed.scales_bytes, fed.codes_bytes * self.bits // 8)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Look the levels up."""
        out_scales[:] = scales
        self.look_up(unpack(codes, self.bits), out_codes)

    def look_up(self, codes: Bytes, out: Bytes) -> None:
        """Write the wire form of codes, one per byte."""
        np.take(self._wire_codes, codes, out=out)

    def _steps(self, groups: Floats) -> Floats:
        top, bottom = extremes(groups)
        step = np.maximum(top, -bottom) / np.float32(self.largest_level)
        if self._side:
            step = np.where(top > -bottom, self._side, -self._side) * step
        signed: Floats = step.astype(np.float32, copy=False)
        return signed

    def _codes(self, groups: Floats, scales: Halves, clip: bool) -> Bytes:
        # So few comparisons of whole arrays are several times as fast as a search per value.
        steps, codes = in_steps(groups, scales), np.zeros(groups.shape, np.uint8)
        for middle in self._middles:
            codes += steps > middle
        return codes

    def _levels_of(self, codes: Bytes) -> Floats:
        return self._table[codes]

    def _pack(self, codes: Bytes) -> Bytes:
        return pack(codes, self.bits)
