"""int4: two values per byte, low nibble first, around the zero point 8.

The codes reach from -8 to 7. The sign of the scale puts the extreme value of a group on the long
side, which makes the step up to an eighth smaller than m/7.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes, Floats, Wire
from edge_memllm.codecs.grouped import GroupedCodec


class Int4Codec(GroupedCodec):
    """value = (nibble - 8) * scale; the scale may be negative.

    With m the largest magnitude and o the largest one of opposite sign, abs(scale) is
    max(m/8, o/7): nothing is clipped on either side.
    """

    wire: Wire = "q4"
    bits = 4
    largest_code = 7

    def _steps(self, groups: Floats) -> Floats:
        above = np.maximum(groups.max(axis=1), 0)
        below = np.maximum(-groups.min(axis=1), 0)
        step = np.maximum(np.maximum(above, below) / 8, np.minimum(above, below) / 7)
        signed: Floats = np.where(above > below, -step, step)
        return signed

    def _pack(self, codes: NDArray[np.uint8], count: int) -> Bytes:
        codes = codes.reshape(count, -1)
        packed = codes[:, 1::2] << np.uint8(4)
        packed |= codes[:, 0::2]
        return packed

    def _unpack(self, codes: Bytes) -> Floats:
        values = np.empty((len(codes), codes.shape[1], 2), np.float32)
        values[:, :, 0] = codes & np.uint8(15)
        values[:, :, 1] = codes >> np.uint8(4)
        values -= 8
        return values.reshape(len(codes), codes.shape[1] * 2)
