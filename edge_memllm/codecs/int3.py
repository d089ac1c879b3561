"""int3: eight levels for values of a normal distribution, eight codes to three bytes."""

from __future__ import annotations

from edge_memllm.codecs.levels import LevelsCodec

# What the fit of `codebook` finds for groups of 64 normally distributed values. The one farthest
# from zero is stored exactly.
LEVELS = (-92, -56, -29, -5, 19, 45, 77, 127)


class Int3Codec(LevelsCodec):
    """value = level * scale; the value farthest from zero is at 127, so the scale has its sign."""

    def __init__(self, group: int) -> None:
        super().__init__("int3", group, LEVELS, smallest_factor=0.85)
