"""int6: six bits per value around the zero point 32, eight codes to six bytes."""

from __future__ import annotations

from edge_memllm.codecs.uniform import PackedUniformCodec


class Int6Codec(PackedUniformCodec):
    """value = (code - 32) * scale, code in 0..63; the scale may be negative."""

    bits = 6
    largest_level = 31
    # The smallest of these clips the extreme value by 0.015 m, half a step is m/62 at most.
    factors = (0.985, 0.99, 0.995)
