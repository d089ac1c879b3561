"""int4: two values per byte, low nibble first, around the zero point 8.

The codes reach from -8 to 7. The sign of the scale puts the extreme value of a group on the long
side, which makes the step up to an eighth smaller than m/7.
"""

from __future__ import annotations

from edge_memllm.codecs.codec import Bytes, Floats, Wire
from edge_memllm.codecs.grouped import steps_around
from edge_memllm.codecs.uniform import UniformCodec
from edge_memllm.codecs.wire import pack_nibbles


class Int4Codec(UniformCodec):
    """value = (nibble - 8) * scale; the scale may be negative.

    With m the largest magnitude and o the largest one of opposite sign, abs(scale) is
    max(m/8, o/7): nothing is clipped on either side.
    """

    wire: Wire = "q4"
    bits = 4
    largest_level = 7
    # A step that is 7 % smaller clips the extreme value by 0.07 m, half a step is m/14 at most.
    factors = (0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)

    def _steps(self, groups: Floats) -> Floats:
        return steps_around(groups, long=8, short=7)

    def _pack(self, codes: Bytes) -> Bytes:
        return pack_nibbles(codes)
