"""What codecs with uneven levels share: a short table of whole numbers, which the graph is fed.

The levels lie between -128 and 127, so that a value in the wire form q8 is one lookup away and
has the same scale: transcoding is exact.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import Codec
from edge_memllm.codecs.grouped import FLOAT16_MAX, GroupedCodec, Halves, extremes, in_steps
from edge_memllm.codecs.wire import CodecSizes, Wire, pack, unpack

_ZERO = 128  # of the wire form
_FACTORS = (0.85, 0.88, 0.91, 0.94, 0.97)  # a search tries scales that much smaller


# What the fit of `codebook` finds for groups of 64 normally distributed values. The one farthest
# from zero is stored exactly.
INT2_LEVELS = (-61, -7, 44, 127)


# What the fit of `codebook` finds for groups of 64 normally distributed values. The one farthest
# from zero is stored exactly.
INT3_LEVELS = (-92, -56, -29, -5, 19, 45, 77, 127)


# The levels of NF4 (Dettmers et al., 2023, QLoRA), times 127 and rounded: none is off by more
# than 0.4 % of the largest value, and the graph can be fed them as int8.
NF4_LEVELS = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)

_FARTHEST = 127
_SMALLEST_FACTOR = 0.85
_BINS = 4096
_ROUNDS = 200  # of Lloyd's algorithm; far more than it takes to settle


class LevelsCodec(GroupedCodec):
    """value = levels[code] * scale, where the value farthest from zero is at the farthest level.

    The scale is negative where that value and that level are on different sides of zero.
    """

    wire: Wire = "q8"
    transcodes = True

    def __init__(
        self, name: str, group: int, levels: tuple[int, ...], smallest_factor: float
    ) -> None:
        """Take ascending levels, a power of two of them, and how much a search may shrink scales.

        A value may then lie beyond the last level of its side, as `miss` says.
        """
        self.levels = levels
        ends = -levels[0], levels[-1]
        self.bits = len(levels).bit_length() - 1
        self.largest_level = max(ends)
        gap = max(high - low for low, high in pairwise(levels))
        self.miss = max(gap / 2, max(ends) - smallest_factor * min(ends))
        self.factors = tuple(each for each in _FACTORS if each >= smallest_factor)
        self._side = np.sign(ends[1] - ends[0])
        self._table = np.array(levels, np.float32)
        self._middles = np.array([(low + high) / 2 for low, high in pairwise(levels)], np.float32)
        self._wire_codes = (np.array(levels) + _ZERO).astype(np.uint8)
        super().__init__(name, group)

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        fed = self.wire_sizes(layers, width)
        return CodecSizes(fed.scales_bytes, fed.codes_bytes * self.bits // 8)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Look the levels up."""
        out_scales[:] = scales
        self.look_up(unpack(codes, self.bits), out_codes)

    def look_up(self, codes: Bytes, out: Bytes) -> None:
        """Write the wire form of codes, one per byte."""
        np.take(self._wire_codes, codes, out=out)

    def _steps(self, groups: Floats) -> Floats:
        top, bottom = extremes(groups)
        step = np.maximum(top, -bottom) / np.float32(self.largest_level)
        if self._side:
            step = np.where(top > -bottom, self._side, -self._side) * step
        signed: Floats = step.astype(np.float32, copy=False)
        return signed

    def _codes(self, groups: Floats, scales: Halves, clip: bool) -> Bytes:
        # So few comparisons of whole arrays are several times as fast as a search per value.
        steps, codes = in_steps(groups, scales), np.zeros(groups.shape, np.uint8)
        for middle in self._middles:
            codes += steps > middle
        return codes

    def _levels_of(self, codes: Bytes) -> Floats:
        return self._table[codes]

    def _pack(self, codes: Bytes) -> Bytes:
        return pack(codes, self.bits)


class Int2Codec(LevelsCodec):
    """value = level * scale; the value farthest from zero is at 127, so the scale has its sign."""

    def __init__(self, group: int) -> None:
        super().__init__("int2", group, INT2_LEVELS, smallest_factor=0.85)


class Int3Codec(LevelsCodec):
    """value = level * scale; the value farthest from zero is at 127, so the scale has its sign."""

    def __init__(self, group: int) -> None:
        super().__init__("int3", group, INT3_LEVELS, smallest_factor=0.85)


class NormalFloat4Codec(LevelsCodec):
    """value = level * scale, the scale being m/127 for the largest magnitude m of the group."""

    def __init__(self, group: int) -> None:
        super().__init__("nf4", group, NF4_LEVELS, smallest_factor=0.85)


class CodebookCodec(Codec):
    """value = levels[layer][code] * scale; the value farthest from zero is at level 127."""

    wire: Wire = "q8"
    transcodes = True
    searches = True

    def __init__(self, bits: int, group: int, layers: tuple[LevelsCodec, ...] = ()) -> None:
        self.bits = bits
        self.group: int = group
        self.id = f"codebook{bits}-g{group}"
        self.limit = FLOAT16_MAX * _FARTHEST
        self._layers = layers

    @property
    def parameters(self) -> bytes:
        """The levels, int8 [L, 2^bits]."""
        return np.array([layer.levels for layer in self._layers], np.int8).tobytes()

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` when the group does not divide width."""
        self._check_group(width)
        fed = self.wire_sizes(layers, width)
        return CodecSizes(fed.scales_bytes, fed.codes_bytes * self.bits // 8)

    def parameters_bytes(self, layers: int, width: int) -> int:
        """Return the bytes of the levels of all layers."""
        return layers << self.bits

    def with_parameters(self, parameters: bytes, layers: int, width: int) -> CodebookCodec:
        """Return this codec with its levels. Raises `ValueError` unless they rise up to 127."""
        self._check_parameters(parameters, layers, width)
        levels = np.frombuffer(parameters, np.int8).reshape(layers, -1).tolist()
        for layer, each in enumerate(levels):
            rising = all(low < high for low, high in pairwise(each))
            if not rising or each[0] < -_FARTHEST or each[-1] != _FARTHEST:
                raise ValueError(
                    f"codec {self.id}: the levels of layer {layer} are {each}, expected numbers "
                    f"that rise from at least -{_FARTHEST} to {_FARTHEST}."
                )
        made = (LevelsCodec(self.id, self.group, tuple(each), _SMALLEST_FACTOR) for each in levels)
        return CodebookCodec(self.bits, self.group, tuple(made))

    def fit(self, layers: int, width: int) -> CodebookFit:
        """Begin to learn the levels."""
        return CodebookFit(self.bits, self.group, layers)

    def bound(self, rows: Floats) -> Floats:
        """Return, for each layer, what `GroupedCodec.bound` says of its levels."""
        parts = [codec.bound(rows[:, [each]]) for each, codec in enumerate(self._made(rows))]
        return np.concatenate(parts, axis=1)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Look the levels of each layer up."""
        out_scales[:] = scales
        layers = self._made()
        unpacked = unpack(codes, self.bits)  # of all layers at once: far fewer steps
        width = out_codes.shape[1] // len(layers)
        for number, layer in enumerate(layers):
            part = slice(number * width, (number + 1) * width)
            layer.look_up(unpacked[:, part], out_codes[:, part])

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        layers = enumerate(self._made(rows))
        parts = [codec.encode(rows[:, [each]], search=search) for each, codec in layers]
        scales, codes = zip(*parts, strict=True)
        return np.concatenate(scales, axis=1), np.concatenate(codes, axis=1)

    def _made(self, rows: Floats | None = None) -> tuple[LevelsCodec, ...]:
        """Return the codecs of all layers. Raises `ValueError` without, or for other layers."""
        if not self._layers or (rows is not None and rows.shape[1] != len(self._layers)):
            found = "some" if rows is None else rows.shape[1]
            raise ValueError(
                f"codec {self.id}: has levels for {len(self._layers)} layers, rows have {found}."
            )
        return self._layers


class CodebookFit:
    """Levels by Lloyd's algorithm on a histogram of all values of a layer.

    Values are counted as parts of the one farthest from zero in their group, with the square of
    that as weight: so what is made small is the squared error.
    """

    def __init__(self, bits: int, group: int, layers: int) -> None:
        self._count = 1 << bits
        self._group = group
        self._histograms = np.zeros((layers, _BINS))

    def add(self, rows: Floats, weights: Floats | None = None) -> None:
        """Count rows [N, L, D]."""
        for layer, histogram in enumerate(self._histograms):
            groups = rows[:, layer].reshape(-1, self._group)
            top, bottom = extremes(groups)
            farthest = np.maximum(top, -bottom)
            signed = np.where(top == farthest, farthest, -farthest)
            used = farthest > 0
            parts = groups[used] / signed[used, None]
            squares = np.square(signed[used], dtype=np.float64)
            if weights is not None:
                squares *= np.repeat(weights, rows.shape[2] // self._group)[used]
            bins = ((parts + 1) * (_BINS / 2)).astype(np.int64)
            np.clip(bins, 0, _BINS - 1, out=bins)
            each = np.repeat(squares, self._group)
            histogram += np.bincount(bins.reshape(-1), each, minlength=_BINS)

    def parameters(self) -> bytes:
        """Return the levels, int8 [L, 2^bits]."""
        return np.stack([_levels(each, self._count) for each in self._histograms]).tobytes()


def _levels(histogram: NDArray[np.float64], count: int) -> NDArray[np.int8]:
    """Return rising levels whose weighted squared error is (nearly) smallest, the last at 127."""
    histogram = histogram + (histogram.sum() + 1) * 1e-12  # no level is ever without values
    middles = (np.arange(_BINS) + 0.5) / (_BINS / 2) - 1
    shares = np.cumsum(histogram) / histogram.sum()
    levels = np.interp((np.arange(count) + 0.5) / count, shares, middles)
    levels[-1] = 1
    for _ in range(_ROUNDS):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, middles)
        amounts = np.bincount(nearest, histogram, minlength=count)
        sums = np.bincount(nearest, histogram * middles, minlength=count)
        levels = np.divide(sums, amounts, out=levels, where=amounts > 0)
        levels[-1] = 1
    whole = np.rint(levels * _FARTHEST).astype(np.int64)
    for place in range(count - 2, -1, -1):  # apart from each other, and with room for the rest
        whole[place] = np.clip(whole[place], place - _FARTHEST, whole[place + 1] - 1)
    found: NDArray[np.int8] = whole.astype(np.int8)
    return found
