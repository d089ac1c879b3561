"""What codecs with a float16 scale per group of G values share: scales, bound, search for scales.

A value is level * scale, where a codec's levels are whole numbers ("steps"). The scale is rounded
up to float16, so that the largest value of a group is at most the outermost level away from zero.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes, Codec, Floats

FLOAT16_MAX = 65504.0
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
Halves = NDArray[np.float16]


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
