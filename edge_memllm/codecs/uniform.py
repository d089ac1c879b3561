"""What int8 and int4 share: whole numbers around a zero point, fed to the graph as stored."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, CodecSizes, Floats
from edge_memllm.codecs.grouped import GroupedCodec, Halves, in_steps


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
