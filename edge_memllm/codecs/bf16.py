"""bf16: the upper half of a float32, eight bits of precision."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats, Wire
from edge_memllm.codecs.small_floats import decode_bfloat16, encode_bfloat16


class BFloat16Codec(Codec):
    """Values rounded to bfloat16; the graph is fed them as float16, so they must fit in that."""

    id = "bf16"
    wire: Wire = "f16"
    transcodes = True
    limit = 65280.0  # the largest bfloat16 that is not too large for a float16

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record."""
        return CodecSizes(scales_bytes=0, codes_bytes=layers * width * 2)

    def bound(self, rows: Floats) -> Floats:
        """Return half a unit in the last place, abs(x) * 2^-8, or 2^-24 if that is more.

        A bfloat16 is a float16 exactly from 2^-14 on; below, float16 goes in steps of 2^-24.
        """
        return np.maximum(np.abs(rows) * np.float32(2.0**-8), np.float32(2.0**-24))

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Round to float16."""
        out_codes.view("<f2")[:] = decode_bfloat16(codes)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        codes = encode_bfloat16(rows).reshape(len(rows), -1)
        return np.empty((len(rows), 0), np.uint8), codes
