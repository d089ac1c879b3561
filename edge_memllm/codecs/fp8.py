"""fp8: one byte per value as a small float (e4m3), and a float16 scale per group."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats, Wire
from edge_memllm.codecs.grouped import SMALLEST_SCALE, extremes, in_steps, round_away_from_zero
from edge_memllm.codecs.small_floats import E4M3_LARGEST, e4m3_values, encode_e4m3
from edge_memllm.codecs.wire import wire_sizes


class Float8Codec(Codec):
    """value = e4m3(code) * scale, rounded to float16; scale = m/448 for the largest magnitude m.

    Unlike int8 it keeps small values of a group as exact, relatively, as large ones.
    """

    wire: Wire = "f16"
    transcodes = True
    limit = 65024.0  # scales are rounded up, and a decoded value must fit in a float16

    def __init__(self, group: int) -> None:
        self.group: int = group
        self.id = f"fp8-g{group}"
        self._values = e4m3_values()

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        return wire_sizes("q8", layers * width, self.group)

    def bound(self, rows: Floats) -> Floats:
        """Return abs(x) * (2^-4 + 2^-10) + s * 2^-10 + 2^-24, s = m/448 * (1 + 2^-10) + 2^-24.

        e4m3 has four bits of precision, and steps of s * 2^-9 near zero. The other terms are
        for the float16 that the graph is fed.
        """
        largest = np.abs(rows.reshape(-1, self.group)).max(axis=1, initial=0.0)
        scale = largest / E4M3_LARGEST * (1 + 2.0**-10) + SMALLEST_SCALE
        fixed = np.repeat(scale * 2.0**-10 + SMALLEST_SCALE, self.group).reshape(rows.shape)
        total: Floats = (np.abs(rows) * (2.0**-4 + 2.0**-10) + fixed).astype(np.float32)
        return total

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Look the floats up, scale them and round to float16."""
        factors = scales.view("<f2").astype(np.float32)
        values = self._values[codes].reshape(*factors.shape, self.group)
        values *= factors[:, :, None]
        out_codes.view("<f2")[:] = values.reshape(codes.shape)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        groups = rows.reshape(-1, self.group)
        top, bottom = extremes(groups)
        largest: Floats = np.maximum(top, -bottom)
        steps = largest / np.float32(E4M3_LARGEST)
        scales = round_away_from_zero(steps)
        codes = encode_e4m3(in_steps(groups, scales))
        packed = scales.astype("<f2").view(np.uint8)
        return packed.reshape(len(rows), -1), codes.reshape(len(rows), -1)
