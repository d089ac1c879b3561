"""What int8 and int4 share: groups of G values, one float16 scale per group, rounded to codes.

The scale is rounded up to float16, so that no value of the group is clipped and every value is
at most half a step away from its code.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats

FLOAT16_MAX = 65504.0
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


class GroupedCodec(Codec):
    """A codec with `bits` per value around a zero point, and a float16 scale per group."""

    bits: int
    largest_code: int  # values are never further than largest_code steps from zero on both sides

    def __init__(self, group: int) -> None:
        self.group: int = group
        self.id = f"int{self.bits}-g{group}"
        self.limit = FLOAT16_MAX * self.largest_code

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        if width % self.group:
            raise ValueError(
                f"codec {self.id}: width {width} is not a multiple of the group size {self.group}."
            )
        values = layers * width
        return CodecSizes(
            scales_bytes=values // self.group * 2, codes_bytes=values * self.bits // 8
        )

    def bound(self, rows: Floats) -> Floats:
        """Return half a step per value: (1/2 + 2^-14) * s for s = m/c * (1 + 2^-10) + 2^-24.

        Here m is the largest magnitude of the group and c is 127 for int8 and 7 for int4. The two
        terms of s allow for rounding the scale up, to a normal or to a subnormal float16; 2^-14
        allows for rounding the quotient in float32.
        """
        groups = self._groups(rows)
        largest = np.abs(groups).max(axis=1, initial=0.0)
        step = largest / self.largest_code * (1 + 2.0**-10) + SMALLEST_SCALE
        spread = np.repeat((0.5 + 2.0**-14) * step, self.group)
        return spread.astype(np.float32).reshape(rows.shape)

    @abstractmethod
    def _steps(self, groups: Floats) -> Floats:
        """Return the exact step [n] for groups [n, G]; negative to turn the code range around."""

    @abstractmethod
    def _pack(self, codes: NDArray[np.uint8], count: int) -> Bytes:
        """Pack codes, one per byte and already around the zero point, to [count, codes_bytes]."""

    @abstractmethod
    def _unpack(self, codes: Bytes) -> Floats:
        """Return packed codes [N, codes_bytes] as floats [N, L*D] around 0."""

    def _encode(self, rows: Floats) -> tuple[Bytes, Bytes]:
        groups = self._groups(rows)
        scales = _round_away_from_zero(self._steps(groups))
        steps = scales.astype(np.float32)
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
        codes = groups * inverse[:, None]
        codes += 0.5 + (1 << (self.bits - 1))  # the zero point; +0.5 and truncation round
        packed = self._pack(codes.astype(np.uint8), len(rows))
        return scales.astype("<f2").view(np.uint8).reshape(len(rows), -1), packed

    def _decode(self, scales: Bytes, codes: Bytes, layers: int, width: int) -> Floats:
        values = self._unpack(codes).reshape(len(codes), layers * width // self.group, self.group)
        values *= scales.view("<f2").astype(np.float32)[:, :, None]
        return values.reshape(len(codes), layers, width)

    def _groups(self, rows: Floats) -> Floats:
        return rows.reshape(-1, self.group)


def _round_away_from_zero(steps: Floats) -> NDArray[np.float16]:
    """Return the nearest float16 that is not smaller in magnitude; only 0 becomes 0."""
    rounded = steps.astype(np.float16)
    short = np.abs(rounded) < np.abs(steps)
    outward = np.copysign(np.float16(np.inf), rounded)
    return np.nextafter(rounded, outward, out=rounded, where=short)
