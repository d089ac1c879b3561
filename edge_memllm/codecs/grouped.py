"""What codecs with a float16 scale per group of G values share: scales, bound, search for scales.

A value is level * scale, where a codec's levels are whole numbers ("steps"). The scale is rounded
up to float16, so that the largest value of a group is at most the outermost level away from zero.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import Codec
from edge_memllm.codecs.wire import CodecSizes, Wire, pack, pack_nibbles, unpack, unpack_nibbles

FLOAT16_MAX = 65504.0
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
Halves = NDArray[np.float16]

_WIRE_ZERO = 128

_STEPS = 15


class GroupedCodec(Codec):
    """A codec with `bits` per value and a float16 scale per group."""

    bits: int
    largest_level: int  # a scale is at most m / largest_level, m the largest magnitude of a group
    miss: float  # how far a value may be from its level, in such steps
    factors: tuple[float, ...] = ()  # what a search multiplies scales with; within the bound

    def __init__(self, name: str, group: int) -> None:
        self.group: int = group
        self.id = f"{name}-g{group}"
        self.limit = FLOAT16_MAX * self.largest_level
        self.searches = bool(self.factors)

    def bound(self, rows: Floats) -> Floats:
        """Return (miss + 2^-14) * s for s = m/c * (1 + 2^-10) + 2^-24 for every value.

        Here m is the largest magnitude of the group, c the largest level. The two terms of s
        allow for rounding the scale up, to a normal or to a subnormal float16; 2^-14 allows for
        computing in float32.
        """
        groups = self._groups(rows)
        largest = np.abs(groups).max(axis=1, initial=0.0)
        step = largest / self.largest_level * (1 + 2.0**-10) + SMALLEST_SCALE
        spread = np.repeat((self.miss + 2.0**-14) * step, self.group)
        return spread.astype(np.float32).reshape(rows.shape)

    @abstractmethod
    def _steps(self, groups: Floats) -> Floats:
        """Return the exact step [n] for groups [n, G]; negative to turn the range around."""

    @abstractmethod
    def _codes(self, groups: Floats, scales: Halves, clip: bool) -> Bytes:
        """Return the codes [n, G], one per byte, of the levels nearest to groups / scales.

        Without `clip`, no value lies further out than the outermost levels.
        """

    @abstractmethod
    def _levels_of(self, codes: Bytes) -> Floats:
        """Return the levels that codes stand for."""

    @abstractmethod
    def _pack(self, codes: Bytes) -> Bytes:
        """Pack codes [N, L*D], one per byte, to [N, codes_bytes]."""

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        groups = self._groups(rows)
        steps = self._steps(groups)
        scales = round_away_from_zero(steps)
        if search:
            scales = self._search(groups, steps, scales)
        codes = self._codes(groups, scales, search).reshape(len(rows), -1)
        return scales.astype("<f2").view(np.uint8).reshape(len(rows), -1), self._pack(codes)

    def _search(self, groups: Floats, steps: Floats, scales: Halves) -> Halves:
        """Return those scales, the given ones among them, whose squared error is smallest.

        Every other one is rounded up as well: it must not clip more than the bound allows.
        """
        least = self._squared_error(groups, scales)
        for factor in self.factors:
            tried = round_away_from_zero(steps * np.float32(factor))
            error = self._squared_error(groups, tried)
            better = error < least
            least[better], scales[better] = error[better], tried[better]
        return scales

    def _squared_error(self, groups: Floats, scales: Halves) -> Floats:
        error = self._levels_of(self._codes(groups, scales, True))
        error *= scales.astype(np.float32)[:, None]
        error -= groups
        squared: Floats = np.einsum("ng,ng->n", error, error)
        return squared

    def _groups(self, rows: Floats) -> Floats:
        return rows.reshape(-1, self.group)


def extremes(groups: Floats) -> tuple[Floats, Floats]:
    """Return the largest and the smallest value of each of groups [n, G]."""
    columns = np.ascontiguousarray(groups.T)  # along whole rows numpy is four times as fast
    return columns.max(axis=0), columns.min(axis=0)


def round_away_from_zero(steps: Floats) -> Halves:
    """Return the nearest float16 that is not smaller in magnitude; only 0 becomes 0."""
    rounded = steps.astype(np.float16)
    short = np.abs(rounded) < np.abs(steps)
    outward = np.copysign(np.float16(np.inf), rounded)
    return np.nextafter(rounded, outward, out=rounded, where=short)


def in_steps(groups: Floats, scales: Halves) -> Floats:
    """Return groups [n, G] divided by their scales [n]; zero where the scale is zero."""
    steps = scales.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    return groups * inverse[:, None]


def steps_around(groups: Floats, long: int, short: int) -> Floats:
    """Return steps [n] that keep groups [n, G] within `long` on one side, `short` on the other.

    They are negative where it is the largest value, not the smallest, that needs the long side:
    codes reach further below zero than above.
    """
    top, bottom = extremes(groups)
    above, below = np.maximum(top, 0), np.maximum(-bottom, 0)
    far, near = np.maximum(above, below), np.minimum(above, below)
    step = np.maximum(far / np.float32(long), near / np.float32(short))
    signed: Floats = np.where(above > below, -step, step)
    return signed


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


class PackedUniformCodec(UniformCodec):
    """Codes that the graph is not fed as they are stored: packed, and around a zero of their own.

    They reach a step further below zero than above, so the scale may be negative, as in `int4`.
    """

    wire: Wire = "q8"
    transcodes = True

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        fed = self.wire_sizes(layers, width)
        return CodecSizes(fed.scales_bytes, fed.codes_bytes * self.bits // 8)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Unpack the codes and move their zero."""
        out_scales[:] = scales
        np.add(unpack(codes, self.bits), np.uint8(_WIRE_ZERO - self._zero), out=out_codes)

    def _steps(self, groups: Floats) -> Floats:
        return steps_around(groups, self._zero, self._zero - 1)

    def _pack(self, codes: Bytes) -> Bytes:
        return pack(codes, self.bits)


class Int4Codec(UniformCodec):
    """value = (nibble - 8) * scale; the scale may be negative.

    With m the largest magnitude and o the largest one of opposite sign, abs(scale) is
    max(m/8, o/7): nothing is clipped on either side.
    """

    wire: Wire = "q4"
    bits = 4
    largest_level = 7
    # A step that is 7 % smaller clips the extreme value by 0.07 m, half a step is m/14 at most.
    factors = (0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)

    def _steps(self, groups: Floats) -> Floats:
        return steps_around(groups, long=8, short=7)

    def _pack(self, codes: Bytes) -> Bytes:
        return pack_nibbles(codes)


class Int5Codec(PackedUniformCodec):
    """value = (code - 16) * scale, code in 0..31; the scale may be negative."""

    bits = 5
    largest_level = 15
    # The smallest of these clips the extreme value by 0.03 m, half a step is m/30 at most.
    factors = (0.97, 0.98, 0.99)


class Int6Codec(PackedUniformCodec):
    """value = (code - 32) * scale, code in 0..63; the scale may be negative."""

    bits = 6
    largest_level = 31
    # The smallest of these clips the extreme value by 0.015 m, half a step is m/62 at most.
    factors = (0.985, 0.99, 0.995)


class Int8Codec(UniformCodec):
    """value = (code - 128) * scale, code in 1..255, scale = m/127 for the largest magnitude m."""

    wire: Wire = "q8"
    bits = 8
    largest_level = 127

    def _steps(self, groups: Floats) -> Floats:
        top, bottom = extremes(groups)
        largest: Floats = np.maximum(top, -bottom)
        return largest / np.float32(127)

    def _pack(self, codes: Bytes) -> Bytes:
        return codes


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
