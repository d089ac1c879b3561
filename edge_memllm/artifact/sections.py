"""A table in several sections: for each class of tokens and each layer a codec of its own.

Records of different classes differ in size. The parameters of such a table are the class of every
token, u8 [V], and then those of all classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Floats, Ids
from edge_memllm.artifact.layout import Offsets, RecordLayout, TableLayout
from edge_memllm.codecs import MIXED, EmbeddingForm, get_codec, layered_codec
from edge_memllm.codecs.codec import Codec, Fit
from edge_memllm.codecs.layered import Allocation, TokenClass, check_classes, smallest_group

_OFFSET_BYTES = 9  # for each token: where its record begins, and its section


@dataclass(frozen=True, slots=True, eq=False)
class MixedLayout(TableLayout):
    """A section for each class of tokens, all fed in the wire form q8 with one group.

    What a table needs is added step by step: `of_classes`, then `with_parameters`; or `of`, and
    then the parameters that `fit` finds.
    """

    kinds: tuple[RecordLayout, ...]
    classes: tuple[TokenClass, ...]  # the first of which lies first in the file
    class_of: NDArray[np.uint8] | None = None  # of every token [V], None before it is known

    @classmethod
    def of_classes(cls, like: TableLayout, classes: tuple[TokenClass, ...]) -> Self:
        """Return the layout of tables with these classes, the rest as in `like`.

        Raises `ValueError` for classes that no table can have, or another number of layers.
        """
        check_classes(classes)
        group = smallest_group(classes)
        codecs = (
            layered_codec(f"mixed-g{group}, class {number}", each.layers, group)
            for number, each in enumerate(classes)
        )
        return cls(tuple(map(like.with_codec, codecs)), classes)

    @classmethod
    def of(cls, like: TableLayout, allocation: Allocation) -> Self:
        """Return the layout of tables with this allocation; levels are still to be learned."""
        made = cls.of_classes(like, allocation.token_classes)
        return cls(made.kinds, made.classes, allocation.class_of)

    @property
    def layers(self) -> int:
        """Layers that have memory rows."""
        return self.kinds[0].layers

    @property
    def width(self) -> int:
        """W, the values of a row."""
        return self.kinds[0].width

    @property
    def embedding_width(self) -> int:
        """D, the values of the embedding."""
        return self.kinds[0].embedding_width

    @property
    def embedding_dtype(self) -> str:
        """The dtype that the graph is fed embeddings in, "float16" or "float32"."""
        return self.kinds[0].embedding_dtype

    @property
    def embedding_codec(self) -> str | None:
        """The id of the codec that embeddings are stored in; None where they are as fed."""
        return self.kinds[0].embedding_codec

    @property
    def embedding(self) -> EmbeddingForm:
        """How embeddings are stored and fed."""
        return self.kinds[0].embedding

    @property
    def alignment(self) -> int:
        """What strides are multiples of."""
        return self.kinds[0].alignment

    @property
    def codec_id(self) -> str:
        """`mixed-g` and the smallest group of all layers."""
        return f"mixed-g{self.group}"

    @property
    def record_bytes(self) -> int:
        """Bytes of the largest record without padding."""
        return max(each.record_bytes for each in self.kinds)

    @property
    def stride(self) -> int:
        """Bytes from one record to the next where they are largest."""
        return max(each.stride for each in self.kinds)

    @property
    def spacing(self) -> int:
        """The alignment."""
        return self.alignment

    @property
    def coarse(self) -> None:
        """None: no front part can be read alone."""
        return None

    @property
    def parameters(self) -> bytes:
        """The class of every token, then the parameters of all classes; empty before."""
        if self.class_of is None:
            return b""
        return self.class_of.tobytes() + b"".join(each.parameters for each in self.kinds)

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the class of every token and of the parameters of all classes."""
        return self._tokens + sum(each.parameters_bytes for each in self.kinds)

    def with_parameters(self, parameters: bytes) -> Self:
        """Return this layout with its parameters.

        Raises `ValueError` unless every class has as many tokens as it should.
        """
        if len(parameters) != self.parameters_bytes:
            raise ValueError(
                f"codec {self.codec_id}: {len(parameters)} bytes of parameters, expected "
                f"{self.parameters_bytes} for {self.layers} layers of {self.width}."
            )
        class_of = np.frombuffer(parameters, np.uint8, self._tokens)
        self._check_counts(class_of)
        kinds: list[RecordLayout] = []
        start = self._tokens
        for each in self.kinds:
            end = start + each.parameters_bytes
            kinds.append(each.with_parameters(parameters[start:end]))
            start = end
        return type(self)(tuple(kinds), self.classes, class_of)

    def fit(self) -> MixedFit:
        """Begin to learn the levels. Raises `ValueError` before tokens have their classes."""
        fits = [each.fit() for each in self.kinds]
        return MixedFit(self._known(), self.counts(self._tokens), fits)

    def counts(self, vocab_size: int) -> tuple[int, ...]:
        """Return how many tokens each class has."""
        return tuple(each.tokens for each in self.classes)

    def sections_of(self, ids: Ids) -> NDArray[np.uint8]:
        """Return the class of each of some tokens."""
        return self._known()[ids]

    def stored_order(self, vocab_size: int) -> Ids:
        """Return all token ids class by class, then by id."""
        return np.argsort(self._known(), kind="stable")

    def offsets(self, vocab_size: int, start: int) -> Offsets:
        """Return the function that finds the records of tokens; takes `offsets_bytes` of memory."""
        offsets = np.empty(vocab_size, np.int64)
        order = self.stored_order(vocab_size)
        for each in self.sections(vocab_size, start):
            tokens = order[each.first : each.first + each.count]
            offsets[tokens] = np.arange(each.start, each.end, each.layout.stride)
        offset_of, class_of = offsets.data, self._known().data
        return lambda tokens: (
            [offset_of[token] for token in tokens],
            [class_of[token] for token in tokens],
        )

    def offsets_bytes(self, vocab_size: int) -> int:
        """Bytes of memory that `offsets` takes."""
        return vocab_size * _OFFSET_BYTES

    @property
    def _tokens(self) -> int:
        return sum(each.tokens for each in self.classes)

    def _known(self) -> NDArray[np.uint8]:
        if self.class_of is None:
            raise ValueError(
                f"codec {self.codec_id}: which token is of which class is not known yet."
            )
        return self.class_of

    def _check_counts(self, class_of: NDArray[np.uint8]) -> None:
        found = np.bincount(class_of, minlength=len(self.classes)).tolist()
        expected = [each.tokens for each in self.classes]
        if found != expected:
            raise ValueError(
                f"codec {self.codec_id}: classes of {_shown(found)} tokens, "
                f"expected {_shown(expected)}."
            )


class MixedFit:
    """A fit for each class, which is shown the rows of its tokens: class after class."""

    def __init__(
        self, class_of: NDArray[np.uint8], counts: Sequence[int], fits: Sequence[Fit]
    ) -> None:
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


def named_layout(
    codec_id: str,
    classes: tuple[TokenClass, ...] | None,
    *,
    layers: int,
    width: int,
    embedding: EmbeddingForm,
    alignment: int,
) -> TableLayout:
    """Return the layout that a manifest names by a codec id and, for a mixed table, classes.

    Raises `ArtifactError` for an id this version lacks, `ValueError` for what cannot be.
    """
    if codec_id not in MIXED:
        codec = get_codec(codec_id)
        if classes is not None:
            raise ValueError(f"codec {codec_id}: has no classes of tokens, found {len(classes)}.")
        return _alike(layers, width, codec, embedding, alignment)
    if classes is None:
        raise ValueError(f"codec {codec_id}: without classes of tokens, expected at least one.")
    if not layers:
        raise ValueError(f"codec {codec_id} without memory layers, expected codec none.")
    like = _alike(layers, width, get_codec("f32"), embedding, alignment)
    made = MixedLayout.of_classes(like, classes)
    if made.codec_id != codec_id:
        raise ValueError(f"codec {codec_id}: the smallest group of its classes is {made.group}.")
    return made


def _alike(
    layers: int, width: int, codec: Codec, embedding: EmbeddingForm, alignment: int
) -> RecordLayout:
    """Return the layout of a table of one section."""
    return RecordLayout(
        layers, width, codec, embedding.dtype, alignment, embedding.width, embedding.codec.id
    )


def _shown(counts: list[int]) -> str:
    """Counts of at most a line: bytes of a damaged file may name 256 classes."""
    shown = ", ".join(map(str, counts[:16]))
    return shown if len(counts) <= 16 else f"{shown}, ..."
