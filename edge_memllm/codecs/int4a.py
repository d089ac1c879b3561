"""int4a: asymmetric int4, sixteen even steps from a group's smallest value to its largest."""

from __future__ import annotations

import numpy as np

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats, Wire
from edge_memllm.codecs.grouped import SMALLEST_SCALE, Halves, extremes, round_away_from_zero
from edge_memllm.codecs.wire import pack_nibbles, unpack_nibbles

_STEPS = 15


class AsymmetricInt4Codec(Codec):
    """value = minimum + nibble * step, rounded to float16.

    The scales are the steps of all groups, then the minima of all groups, both float16.
    """

    wire: Wire = "f16"
    transcodes = True
    limit = 65024.0  # a minimum is rounded down, a step up, and both ends must fit in a float16

    def __init__(self, group: int) -> None:
        self.group: int = group
        self.id = f"int4a-g{group}"

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        values = layers * width
        return CodecSizes(scales_bytes=values // self.group * 4, codes_bytes=values // 2)

    def bound(self, rows: Floats) -> Floats:
        """Return (1/2 + 2^-10) * s + m * 2^-10 + 2^-24 for every value of a group.

        s is the step, (r + m * 2^-10 + 2^-24) / 15 * (1 + 2^-10) + 2^-24 at most: r is largest
        minus smallest value of the group, m the largest magnitude. The other terms of the error
        are for the float16 that the graph is fed.
        """
        groups = rows.reshape(-1, self.group).astype(np.float64)
        top, bottom = groups.max(axis=1, initial=-np.inf), groups.min(axis=1, initial=np.inf)
        largest = np.maximum(top, -bottom)
        reach = top - bottom + largest * 2.0**-10 + SMALLEST_SCALE
        step = reach / _STEPS * (1 + 2.0**-10) + SMALLEST_SCALE
        error = (0.5 + 2.0**-10) * step + largest * 2.0**-10 + SMALLEST_SCALE
        return np.repeat(error, self.group).astype(np.float32).reshape(rows.shape)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Compute the values in float32 and round to float16."""
        steps, minima = np.split(scales.view("<f2").astype(np.float32), 2, axis=1)
        values = unpack_nibbles(codes).astype(np.float32).reshape(*steps.shape, self.group)
        values *= steps[:, :, None]
        values += minima[:, :, None]
        out_codes.view("<f2")[:] = values.reshape(len(codes), out_codes.shape[1] // 2)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        groups = rows.reshape(-1, self.group)
        top, bottom = extremes(groups)
        minima = _round_down(bottom)
        floor = minima.astype(np.float32)
        above = groups - floor[:, None]
        steps = round_away_from_zero((top - floor) / np.float32(_STEPS))
        wide = steps.astype(np.float32)
        above *= np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)[:, None]
        above += 0.5  # truncation then rounds
        codes = pack_nibbles(above.astype(np.uint8).reshape(len(rows), -1))
        both = np.concatenate([part.reshape(len(rows), -1) for part in (steps, minima)], axis=1)
        return both.astype("<f2").view(np.uint8), codes


def _round_down(values: Floats) -> Halves:
    """Return the largest float16 that is not above."""
    rounded = values.astype(np.float16)
    return np.nextafter(rounded, np.float16(-np.inf), out=rounded, where=rounded > values)
