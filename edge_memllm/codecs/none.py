"""none: no memory rows at all, for the dense model (beta 8) whose record is its embedding."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats, Wire


class NoneCodec(Codec):
    """Stores rows [N, 0, D], that is, nothing."""

    id = "none"
    wire: Wire = "none"
    limit = 0.0

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return zero bytes. Raises `ValueError` when there are memory layers to store."""
        if layers:
            raise ValueError(f"codec none: stores no memory rows, but there are {layers} layers.")
        return CodecSizes(scales_bytes=0, codes_bytes=0)

    def bound(self, rows: Floats) -> Floats:
        """Return zero: there is nothing to get wrong."""
        return np.zeros_like(rows)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        nothing = np.empty((len(rows), 0), np.uint8)
        return nothing, nothing
