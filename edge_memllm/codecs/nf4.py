"""nf4: sixteen levels that values of a normal distribution use equally often."""

from __future__ import annotations

from edge_memllm.codecs.levels import LevelsCodec

# The levels of NF4 (Dettmers et al., 2023, QLoRA), times 127 and rounded: none is off by more
# than 0.4 % of the largest value, and the graph can be fed them as int8.
LEVELS = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


class NormalFloat4Codec(LevelsCodec):
    """value = level * scale, the scale being m/127 for the largest magnitude m of the group."""

    def __init__(self, group: int) -> None:
        super().__init__("nf4", group, LEVELS, smallest_factor=0.85)
