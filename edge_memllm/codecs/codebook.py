"""codebook: levels of two, three or four bits that suit the rows of each layer.

The levels are learned from all rows once and shared by all tokens: as the codec's parameters,
int8 [L, 2^bits]. Otherwise each layer is stored as by `int3`: scales, then packed codes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Floats, Wire
from edge_memllm.codecs.grouped import FLOAT16_MAX, extremes
from edge_memllm.codecs.levels import LevelsCodec
from edge_memllm.codecs.packing import unpack

_FARTHEST = 127
_SMALLEST_FACTOR = 0.85
_BINS = 4096
_ROUNDS = 200  # of Lloyd's algorithm; far more than it takes to settle


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
