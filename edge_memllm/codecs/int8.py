"""int8: one byte per value, symmetric around the zero point 128."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Floats, Wire
from edge_memllm.codecs.grouped import extremes
from edge_memllm.codecs.uniform import UniformCodec


class Int8Codec(UniformCodec):
    """value = (code - 128) * scale, code in 1..255, scale = m/127 for the largest magnitude m."""

    wire: Wire = "q8"
    bits = 8
    largest_level = 127

    def _steps(self, groups: Floats) -> Floats:
        top, bottom = extremes(groups)
        largest: Floats = np.maximum(top, -bottom)
        return largest / np.float32(127)

    def _pack(self, codes: Bytes) -> Bytes:
        return codes
