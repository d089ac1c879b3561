"""f32: every value exactly as the network computed it. The reference for all other codecs."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats, Wire


class Float32Codec(Codec):
    """Values as float32, exact."""

    id = "f32"
    wire: Wire = "f32"
    limit = float(np.finfo(np.float32).max)

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record."""
        return CodecSizes(scales_bytes=0, codes_bytes=layers * width * 4)

    def bound(self, rows: Floats) -> Floats:
        """Return zero: this codec is exact."""
        return np.zeros_like(rows)

    def _encode(self, rows: Floats) -> tuple[Bytes, Bytes]:
        codes = rows.astype("<f4").view(np.uint8).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes

    def _decode(self, scales: Bytes, codes: Bytes, layers: int, width: int) -> Floats:
        return codes.view("<f4").astype(np.float32).reshape(len(codes), layers, width)
