"""f32: every value exactly as the network computed it. The reference for all other codecs."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, Floats, Wire


class Float32Codec(Codec):
    """Values as float32, exact."""

    id = "f32"
    wire: Wire = "f32"
    limit = float(np.finfo(np.float32).max)

    def bound(self, rows: Floats) -> Floats:
        """Return zero: this codec is exact."""
        return np.zeros_like(rows)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        codes = rows.astype("<f4").view(np.uint8).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes
