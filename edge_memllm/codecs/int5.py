"""int5: five bits per value around the zero point 16, eight codes to five bytes."""

from __future__ import annotations

from edge_memllm.codecs.uniform import PackedUniformCodec


class Int5Codec(PackedUniformCodec):
    """value = (code - 16) * scale, code in 0..31; the scale may be negative."""

    bits = 5
    largest_level = 15
    # The smallest of these clips the extreme value by 0.03 m, half a step is m/30 at most.
    factors = (0.97, 0.98, 0.99)
