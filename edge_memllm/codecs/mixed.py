"""mixed: for each class of tokens and each layer a codec of its own.

Records of different classes differ in size, so what can be asked of one record is asked of its
class, in `variants`. The parameters are the class of every token, u8 [V], and then those of all
classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import (
    PART_GROUPS,
    Allocation,
    Codec,
    CodecSizes,
    Fit,
    TokenClass,
    Wire,
    check_classes,
    smallest_group,
)
from edge_memllm.codecs.grouped import Int4Codec, Int5Codec, Int6Codec, Int8Codec
from edge_memllm.codecs.levels import CodebookCodec, Int2Codec, Int3Codec
from edge_memllm.codecs.wire import unpack_nibbles

_Q4_TO_Q8 = np.uint8(128 - 8)  # between the zero points of the wire forms

_PARTS: dict[str, Codec] = {
    codec.id: codec
    for group in PART_GROUPS
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


class MixedCodec(Codec):
    """Fed in the wire form q8, with the smallest group of all parts.

    What a table needs is added step by step: `with_classes`, then `with_parameters`.
    """

    wire: Wire = "q8"
    transcodes = True

    def __init__(
        self,
        group: int,
        classes: tuple[TokenClass, ...] = (),
        variants: tuple[Codec, ...] = (),
        class_of: NDArray[np.uint8] | None = None,
    ) -> None:
        """Take the group; the rest comes from `with_classes`, `of` and `with_parameters`."""
        self.id = f"mixed-g{group}"
        self.group: int = group
        self.limit = min((codec.limit for codec in variants), default=0.0)
        self.searches = any(codec.searches for codec in variants)
        self._classes = classes
        self._variants = variants
        self._class_of = class_of

    @classmethod
    def of(cls, allocation: Allocation) -> MixedCodec:
        """Return the codec that stores by this allocation; its levels are still to be learned."""
        made = cls(smallest_group(allocation.token_classes)).with_classes(allocation.token_classes)
        return cls(made.group, made._classes, made._variants, allocation.class_of)

    @property
    def classes(self) -> tuple[TokenClass, ...]:
        """The classes, the first of which lies first in the file."""
        return self._classes

    @property
    def class_of(self) -> NDArray[np.uint8] | None:
        """The class of every token [V], None before it is known."""
        return self._class_of

    @property
    def variants(self) -> tuple[Codec, ...]:
        """The codec of each class."""
        return self._variants

    @property
    def parameters(self) -> bytes:
        """The class of every token, then the parameters of all classes."""
        if self._class_of is None:
            return b""
        return self._class_of.tobytes() + b"".join(each.parameters for each in self._variants)

    def with_classes(self, classes: tuple[TokenClass, ...]) -> MixedCodec:
        """Return this codec for these classes. Raises `ValueError` unless it is that of theirs."""
        check_classes(classes)
        if (group := smallest_group(classes)) != self.group:
            raise ValueError(f"codec {self.id}: the smallest group of its classes is {group}.")
        variants = (
            LayeredCodec(f"{self.id}, class {number}", [_PARTS[p] for p in each.layers], self.group)
            for number, each in enumerate(classes)
        )
        return MixedCodec(self.group, classes, tuple(variants))

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes of the largest record. Raises `ValueError` without classes."""
        each = [codec.sizes(layers, width) for codec in self._made()]
        return max(each, key=lambda sizes: sizes.scales_bytes + sizes.codes_bytes)

    def parameters_bytes(self, layers: int, width: int) -> int:
        """Return the bytes of the class of every token and of the parameters of all classes."""
        learned = sum(codec.parameters_bytes(layers, width) for codec in self._made())
        return self._tokens + learned

    def with_parameters(self, parameters: bytes, layers: int, width: int) -> MixedCodec:
        """Return this codec with its parameters.

        Raises `ValueError` unless every class has as many tokens as it should.
        """
        self._check_parameters(parameters, layers, width)
        class_of = np.frombuffer(parameters, np.uint8, self._tokens)
        self._check_counts(class_of)
        variants: list[Codec] = []
        start = self._tokens
        for codec in self._variants:
            end = start + codec.parameters_bytes(layers, width)
            variants.append(codec.with_parameters(parameters[start:end], layers, width))
            start = end
        return MixedCodec(self.group, self._classes, tuple(variants), class_of)

    def fit(self, layers: int, width: int) -> MixedFit:
        """Begin to learn the levels. Raises `ValueError` before tokens have their classes."""
        if self._class_of is None:
            raise ValueError(f"codec {self.id}: which token is of which class is not known yet.")
        fits = [codec.fit(layers, width) for codec in self._variants]
        return MixedFit(self._class_of, [each.tokens for each in self._classes], fits)

    def bound(self, rows: Floats) -> Floats:
        """Refuse: a bound is that of a class."""
        self._refuse()

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Refuse: what bytes mean depends on the class."""
        self._refuse()

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        self._refuse()

    @property
    def _tokens(self) -> int:
        return sum(each.tokens for each in self._classes)

    def _made(self) -> tuple[Codec, ...]:
        if not self._variants:
            raise ValueError(f"codec {self.id}: without classes of tokens, expected at least one.")
        return self._variants

    def _check_counts(self, class_of: NDArray[np.uint8]) -> None:
        found = np.bincount(class_of, minlength=len(self._classes)).tolist()
        expected = [each.tokens for each in self._classes]
        if found != expected:
            raise ValueError(
                f"codec {self.id}: classes of {_shown(found)} tokens, expected {_shown(expected)}."
            )

    def _refuse(self) -> NoReturn:
        raise ValueError(f"codec {self.id}: records are of a class; ask the codec of the class.")


class MixedFit:
    """A fit for each class, which is shown the rows of its tokens: class after class."""

    def __init__(self, class_of: NDArray[np.uint8], counts: list[int], fits: list[Fit]) -> None:
        self._class_of = class_of
        self._ends = np.cumsum(counts)
        self._fits = fits
        self._seen = 0

    def add(self, rows: Floats, weights: Floats | None = None) -> None:
        """Show rows [N, L, D], which follow those shown before, to the fits of their classes."""
        start = 0
        while start < len(rows):
            number = int(np.searchsorted(self._ends, self._seen, side="right"))
            count = min(len(rows) - start, int(self._ends[number]) - self._seen)
            part = slice(start, start + count)
            self._fits[number].add(rows[part], None if weights is None else weights[part])
            self._seen += count
            start += count

    def parameters(self) -> bytes:
        """Return the class of every token, and the parameters of all classes."""
        return self._class_of.tobytes() + b"".join(fit.parameters() for fit in self._fits)


def _shown(counts: list[int]) -> str:
    """Counts of at most a line: bytes of a damaged file may name 256 classes."""
    shown = ", ".join(map(str, counts[:16]))
    return shown if len(counts) <= 16 else f"{shown}, ..."
