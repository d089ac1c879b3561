"""layered: for each layer a codec of its own, as the sections of a mixed table are stored.

Which codecs those are is an `Allocation`: one for each layer in each class of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import GROUPS, Codec, Fit
from edge_memllm.codecs.grouped import Int4Codec, Int5Codec, Int6Codec, Int8Codec
from edge_memllm.codecs.levels import CodebookCodec, Int2Codec, Int3Codec
from edge_memllm.codecs.wire import CodecSizes, Wire, unpack_nibbles

MOST_CLASSES = 16
PART_NAMES = (
    "int8",
    "int6",
    "int5",
    "int4",
    "codebook4",
    "codebook3",
    "codebook2",
    "int3",
    "int2",
)
PARTS = tuple(f"{name}-g{group}" for name in PART_NAMES for group in GROUPS)

_Q4_TO_Q8 = np.uint8(128 - 8)  # between the zero points of the wire forms

_PARTS: dict[str, Codec] = {
    codec.id: codec
    for group in GROUPS
    for codec in (
        Int8Codec(group),
        Int6Codec(group),
        Int5Codec(group),
        Int4Codec(group),
        *(CodebookCodec(bits, group) for bits in (4, 3, 2)),
        Int3Codec(group),
        Int2Codec(group),
    )
}


@dataclass(frozen=True, slots=True)
class TokenClass:
    """Tokens whose records are alike: how many, and the codec id of each layer."""

    tokens: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """`classes[c][l]` is the codec id of layer l for tokens of class c, `class_of` [V] their class.

    Class 0 lies first in the file: it should be that of the most frequent tokens. Raises
    `ValueError` for ids that cannot be mixed, classes of different depth or without tokens, and
    tokens of a class that is not there.
    """

    classes: tuple[tuple[str, ...], ...]
    class_of: NDArray[np.uint8]

    def __post_init__(self) -> None:
        _check_class_of(self.class_of, len(self.classes))
        check_classes(self.token_classes)

    @property
    def token_classes(self) -> tuple[TokenClass, ...]:
        """The classes with their counts of tokens, as a manifest says them."""
        counts = np.bincount(self.class_of, minlength=len(self.classes)).tolist()
        return tuple(map(TokenClass, counts, self.classes))


def check_classes(classes: tuple[TokenClass, ...]) -> None:
    """Raise `ValueError` for classes that no table can have."""
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes of tokens, expected 1 to {MOST_CLASSES}.")
    depth = len(classes[0].layers)
    for number, each in enumerate(classes):
        if each.tokens < 1:
            raise ValueError(f"class {number} has {each.tokens} tokens, expected at least one.")
        if not each.layers or len(each.layers) != depth:
            raise ValueError(
                f"class {number} has codecs for {len(each.layers)} layers, class 0 for {depth}; "
                "expected as many, and at least one."
            )
        if unknown := [part for part in each.layers if part not in PARTS]:
            raise ValueError(
                f"class {number}: codec '{unknown[0]}' cannot be mixed with others, expected one "
                f"of {', '.join(PART_NAMES)} with a group of {', '.join(map(str, GROUPS))}."
            )


def smallest_group(classes: tuple[TokenClass, ...]) -> int:
    """Return the smallest group of all layers of checked classes."""
    return min(int(part.rpartition("-g")[2]) for each in classes for part in each.layers)


def _check_class_of(class_of: NDArray[np.uint8], classes: int) -> None:
    if class_of.ndim != 1 or class_of.dtype != np.uint8:
        raise ValueError(
            f"classes of tokens are {class_of.dtype} {class_of.shape}, expected uint8 [V]."
        )
    if class_of.size and class_of.max() >= classes:
        token = int(np.argmax(class_of >= classes))
        raise ValueError(
            f"token {token} is of class {class_of[token]}, expected one from 0 to {classes - 1}."
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layers side by side that are stored by one codec."""

    codec: Codec
    first: int
    layers: int

    @property
    def rows(self) -> slice:
        """Which of all layers these are."""
        return slice(self.first, self.first + self.layers)


class LayeredCodec(Codec):
    """The scales of all layers, then their codes; wire form q8 with the smallest of all groups."""

    wire: Wire = "q8"
    transcodes = True

    def __init__(self, name: str, layers: Sequence[Codec], group: int) -> None:
        """Take the codec of each layer, all in the wire form q8 or q4; `group` divides theirs."""
        self.id = name
        self.group: int = group
        self.limit = min(codec.limit for codec in layers)
        self.searches = any(codec.searches for codec in layers)
        self._stretches = tuple(_stretches(layers))
        self._depth = len(layers)

    @property
    def parameters(self) -> bytes:
        """Those of all layers."""
        return b"".join(each.codec.parameters for each in self._stretches)

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` for another number of layers."""
        if layers != self._depth:
            raise ValueError(
                f"codec {self.id}: there are {layers} layers, it has codecs for {self._depth}."
            )
        parts = self._part_sizes(width)
        return CodecSizes(sum(p.scales_bytes for p in parts), sum(p.codes_bytes for p in parts))

    def parameters_bytes(self, layers: int, width: int) -> int:
        """Return the bytes of the parameters of all layers."""
        return sum(each.codec.parameters_bytes(each.layers, width) for each in self._stretches)

    def with_parameters(self, parameters: bytes, layers: int, width: int) -> LayeredCodec:
        """Return this codec with its parameters. Raises `ValueError` for bytes that cannot be."""
        self._check_parameters(parameters, layers, width)
        made: list[Codec] = []
        start = 0
        for each in self._stretches:
            end = start + each.codec.parameters_bytes(each.layers, width)
            codec = each.codec.with_parameters(parameters[start:end], each.layers, width)
            made += [codec] * each.layers
            start = end
        return LayeredCodec(self.id, made, self.group)

    def fit(self, layers: int, width: int) -> LayeredFit:
        """Begin to find the parameters of the layers that have some."""
        learning = (each for each in self._stretches if each.codec.parameters_bytes(1, width))
        return LayeredFit([(each, each.codec.fit(each.layers, width)) for each in learning])

    def bound(self, rows: Floats) -> Floats:
        """Return, for each layer, the bound of its codec."""
        return np.concatenate([s.codec.bound(rows[:, s.rows]) for s in self._stretches], axis=1)

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Transcode each layer by its codec; scales of larger groups are repeated."""
        width = out_codes.shape[1] // self._depth
        scale_at = code_at = 0
        for each, size in zip(self._stretches, self._part_sizes(width), strict=True):
            scales_end, codes_end = scale_at + size.scales_bytes, code_at + size.codes_bytes
            columns = slice(each.first * width, (each.first + each.layers) * width)
            fed = slice(columns.start // self.group * 2, columns.stop // self.group * 2)
            _repeat(scales[:, scale_at:scales_end], out_scales[:, fed])
            _feed(each.codec, codes[:, code_at:codes_end], out_codes[:, columns])
            scale_at, code_at = scales_end, codes_end

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        parts = [
            each.codec.encode(rows[:, each.rows], search=search and each.codec.searches)
            for each in self._stretches
        ]
        scales, codes = zip(*parts, strict=True)
        return np.concatenate(scales, axis=1), np.concatenate(codes, axis=1)

    def _part_sizes(self, width: int) -> list[CodecSizes]:
        return [each.codec.sizes(each.layers, width) for each in self._stretches]


def layered_codec(name: str, layers: Sequence[str], group: int) -> LayeredCodec:
    """Return the codec of these parts, one of `codec.PARTS` for each layer."""
    return LayeredCodec(name, [_PARTS[part] for part in layers], group)


class LayeredFit:
    """The fits of those layers that have parameters."""

    def __init__(self, fits: list[tuple[Stretch, Fit]]) -> None:
        self._fits = fits

    def add(self, rows: Floats, weights: Floats | None = None) -> None:
        """Show each fit its layers of rows [N, L, D]."""
        for stretch, fit in self._fits:
            fit.add(rows[:, stretch.rows], weights)

    def parameters(self) -> bytes:
        """Return the parameters of all layers."""
        return b"".join(fit.parameters() for _, fit in self._fits)


def _stretches(layers: Sequence[Codec]) -> Iterator[Stretch]:
    """One stretch for neighbours of one codec: fewer and larger steps."""
    first = 0
    for codec, same in groupby(layers):
        count = len(list(same))
        yield Stretch(codec, first, count)
        first += count


def _repeat(scales: Bytes, out: Bytes) -> None:
    """Give each of several smaller groups the scale of the group that they are parts of."""
    wide, narrow = out.view("<f2"), scales.view("<f2")
    times = wide.shape[1] // narrow.shape[1]
    wide[:] = np.repeat(narrow, times, axis=1) if times > 1 else narrow


def _feed(codec: Codec, codes: Bytes, out: Bytes) -> None:
    """Write codes in the wire form q8."""
    if codec.wire == "q4":
        np.add(unpack_nibbles(codes), _Q4_TO_Q8, out=out)
    else:
        nothing = codes[:, :0]
        codec.transcode(nothing, codes, nothing, out)
