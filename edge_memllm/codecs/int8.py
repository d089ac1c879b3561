"""int8: one byte per value, symmetric around the zero point 128."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes, Floats, Wire
from edge_memllm.codecs.grouped import GroupedCodec


class Int8Codec(GroupedCodec):
    """value = (code - 128) * scale, code in 1..255, scale = m/127 for the largest magnitude m."""

    wire: Wire = "q8"
    bits = 8
    largest_code = 127

    def _steps(self, groups: Floats) -> Floats:
        largest: Floats = np.maximum(groups.max(axis=1), -groups.min(axis=1))
        return largest / np.float32(127)

    def _pack(self, codes: NDArray[np.uint8], count: int) -> Bytes:
        return codes.reshape(count, -1)

    def _unpack(self, codes: Bytes) -> Floats:
        return codes.astype(np.float32) - np.float32(128)
