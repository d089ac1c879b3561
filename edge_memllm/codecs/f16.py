"""f16: every value as a float16."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, Floats, Wire


class Float16Codec(Codec):
    """Values rounded to float16; the graph is fed them as they are."""

    id = "f16"
    wire: Wire = "f16"
    limit = 65504.0

    def bound(self, rows: Floats) -> Floats:
        """Return half a unit in the last place: abs(x) * 2^-11, or 2^-25 for subnormals."""
        return np.maximum(np.abs(rows) * np.float32(2.0**-11), np.float32(2.0**-25))

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        codes = rows.astype("<f2").view(np.uint8).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes
