"""mixed: for each class of tokens and each layer a codec of its own.

Records of different classes differ in size, so what can be asked of one record is asked of its
class, in `variants`. The parameters are the class of every token, u8 [V], and then those of all
classes.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.allocation import (
    PART_GROUPS,
    Allocation,
    TokenClass,
    check_classes,
    smallest_group,
)
from edge_memllm.codecs.codebook import CodebookCodec
from edge_memllm.codecs.codec import Bytes, Codec, CodecSizes, Fit, Floats, Wire
from edge_memllm.codecs.int2 import Int2Codec
from edge_memllm.codecs.int3 import Int3Codec
from edge_memllm.codecs.int4 import Int4Codec
from edge_memllm.codecs.int5 import Int5Codec
from edge_memllm.codecs.int6 import Int6Codec
from edge_memllm.codecs.int8 import Int8Codec
from edge_memllm.codecs.layered import LayeredCodec

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
