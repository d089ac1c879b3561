"""One token's record: where its parts lie, its checksum, and the buffer records are read into.

    embedding | scales of all layers | codes of all layers | zeros up to the stride

A codec with a coarse part has it in front: its record is the start of the whole one. Where classes
of tokens differ, records of one class are alike and lie together, class after class. Knows codecs
and numpy; knows nothing of files, manifests or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.codec import Codec
from edge_memllm.codecs.wire import decode_wire
from edge_memllm.readers import Region

EMBEDDING_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
CHECKSUM_BYTES = 8
ALIGNMENTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

WireArrays = dict[str, NDArray[Any]]

PLACE_BYTES = 9  # of memory for each token, where classes of tokens differ
# For token ids: where their records begin in the file, and which variants of the layout they are.
Places = Callable[[Sequence[int]], tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The byte layout shared by all records of a table, or the largest of several `variants`.

    `layers` counts the memory rows of a token: 0 for a model without, whose codec is "none".
    Raises `ValueError` for values that do not fit together.
    """

    layers: int
    width: int  # W, of a row
    codec: Codec
    embedding_dtype: str  # "float16" or "float32"
    alignment: int = 512
    embedding_width: int = 0  # D; 0 stands for that of a row

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedding_width", self.embedding_width or self.width)
        if self.embedding_dtype not in EMBEDDING_DTYPES:
            raise ValueError(
                f"embedding dtype '{self.embedding_dtype}', expected one of "
                f"{', '.join(EMBEDDING_DTYPES)}."
            )
        if self.alignment not in ALIGNMENTS:
            raise ValueError(
                f"alignment {self.alignment}, expected a power of two from {ALIGNMENTS[0]} "
                f"to {ALIGNMENTS[-1]}."
            )
        if self.layers == 0 and self.codec.id != "none":
            raise ValueError(f"codec {self.codec.id} without memory layers, expected codec none.")
        self.codec.sizes(self.layers, self.width)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding."""
        return self.embedding_width * EMBEDDING_DTYPES[self.embedding_dtype].itemsize

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales of all layers."""
        return self.codec.sizes(self.layers, self.width).scales_bytes

    @property
    def codes_bytes(self) -> int:
        """Bytes of the codes of all layers."""
        return self.codec.sizes(self.layers, self.width).codes_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one record without padding."""
        return self.embedding_bytes + self.scales_bytes + self.codes_bytes

    def size_of(self, token: int) -> int:
        """Return the bytes of a token's record without padding."""
        class_of = self.codec.class_of
        return self.variants[0 if class_of is None else class_of[token]].record_bytes

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.record_bytes // self.alignment) * self.alignment

    @property
    def variants(self) -> tuple[RecordLayout, ...]:
        """The layout of each class of tokens; this one alone where all records are alike."""
        if self.codec.classes is None:
            return (self,)
        return tuple(replace(self, codec=codec) for codec in self.codec.variants)

    def counts(self, vocab_size: int) -> tuple[int, ...]:
        """Return how many tokens each variant has."""
        classes = self.codec.classes
        return (vocab_size,) if classes is None else tuple(each.tokens for each in classes)

    def stored_order(self, vocab_size: int) -> NDArray[np.int64]:
        """Return all token ids in the order of their records: class by class, then by id."""
        class_of = self.codec.class_of
        if class_of is None:
            return np.arange(vocab_size)
        return np.argsort(class_of, kind="stable")

    @property
    def coarse(self) -> RecordLayout | None:
        """The layout of the front part that can be read alone, if there is one."""
        codec = self.codec.coarse
        return None if codec is None else replace(self, codec=codec)

    @property
    def checksums(self) -> int:
        """Checksums per record: one of the whole, before it one of the part read alone."""
        return 1 if self.codec.coarse is None else 2

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the codec's parameters, once per table."""
        return self.codec.parameters_bytes(self.layers, self.width)

    @property
    def buffer_bytes(self) -> int:
        """Bytes that a buffer takes per record: as stored, and as the graph is fed if that differs.

        The embedding is fed as it is stored.
        """
        stored = self.embedding_bytes + sum(self.widest)
        return stored + self.fed_bytes - self.embedding_bytes if self.codec.transcodes else stored

    @property
    def fed_bytes(self) -> int:
        """Bytes that the graph is fed per record."""
        fed = self.codec.wire_sizes(self.layers, self.width)
        return self.embedding_bytes + fed.scales_bytes + fed.codes_bytes

    @property
    def widest(self) -> tuple[int, int]:
        """The most bytes of scales, and the most bytes of codes, that any record has."""
        sizes = [each.codec.sizes(self.layers, self.width) for each in self.variants]
        return max(each.scales_bytes for each in sizes), max(each.codes_bytes for each in sizes)

    def records_bytes(self, vocab_size: int) -> int:
        """Bytes of all records, padding included."""
        counts = self.counts(vocab_size)
        return sum(count * each.stride for count, each in zip(counts, self.variants, strict=True))

    def payload_bytes(self, vocab_size: int) -> int:
        """Bytes of what the codec needs: records without padding, and the parameters."""
        counts = self.counts(vocab_size)
        records = zip(counts, self.variants, strict=True)
        return sum(count * each.record_bytes for count, each in records) + self.parameters_bytes

    def table_bytes(self, vocab_size: int) -> int:
        """Bytes of a table file from the first record on: records, checksums, parameters."""
        checksums = vocab_size * self.checksums * CHECKSUM_BYTES
        return self.records_bytes(vocab_size) + checksums + self.parameters_bytes

    def with_parameters(self, parameters: bytes) -> RecordLayout:
        """Return this layout with its codec's parameters. Raises `ValueError` for wrong ones."""
        codec = self.codec.with_parameters(parameters, self.layers, self.width)
        return replace(self, codec=codec)


class RecordBuffer:
    """Room for `capacity` records, allocated once; reads scatter into it without a copy.

    Where the stored form is not what the graph is fed, there is room for both, and `transcode`
    fills one from the other; decoding starts from what the graph is fed as well. The views it
    returns share its memory: they are valid until the next read into the buffer.
    """

    def __init__(self, layout: RecordLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        scales_bytes, codes_bytes = layout.widest
        self._embedding = np.zeros((capacity, layout.embedding_bytes), np.uint8)
        self._scales = np.zeros((capacity, scales_bytes), np.uint8)
        self._codes = np.zeros((capacity, codes_bytes), np.uint8)
        self._wire_scales, self._wire_codes = self._scales, self._codes
        if layout.codec.transcodes:
            fed = layout.codec.wire_sizes(layout.layers, layout.width)
            self._wire_scales = np.zeros((capacity, fed.scales_bytes), np.uint8)
            self._wire_codes = np.zeros((capacity, fed.codes_bytes), np.uint8)
        variants = layout.variants
        self._codecs = [each.codec for each in variants]
        self._sizes = [(each.scales_bytes, each.codes_bytes) for each in variants]
        self._parts = [self._parts_of(*sizes) for sizes in self._sizes]

    def parts(self, slot: int, variant: int = 0) -> list[memoryview]:
        """Return the writable byte ranges of one record of a variant, in record order."""
        return self._parts[variant][slot]

    def transcode(self, count: int, variants: Sequence[int] | None = None) -> None:
        """Bring the first `count` records into the form the graph is fed, if they are not in it.

        In slot i is a record of the variant `variants[i]`; None where there is only one.
        """
        if not self.layout.codec.transcodes:
            return
        found = [0] if variants is None else sorted(set(variants))
        if len(found) == 1:
            self._transcode(slice(count), found[0])
            return
        each = np.array(variants)
        for variant in found:
            self._transcode(np.flatnonzero(each == variant), variant)

    def embedding(self, count: int) -> NDArray[Any]:
        """Return the embeddings of the first `count` records, [count, D] in their stored dtype."""
        return self._embedding[:count].view(EMBEDDING_DTYPES[self.layout.embedding_dtype])

    def wire(self, count: int) -> WireArrays:
        """Return what the graph is fed for the first `count` records, by graph input name."""
        codes, scales = self._wire_codes[:count], self._wire_scales[:count]
        match self.layout.codec.wire:
            case "none":
                return {}
            case "f32":
                return {"memory_rows": codes.view("<f4")}
            case "f16":
                return {"memory_rows": codes.view("<f2")}
            case "q8" | "q4":
                return {"memory_codes": codes, "memory_scales": scales.view("<f2")}

    def wire_bytes(self, count: int) -> tuple[Bytes, Bytes]:
        """Return what `wire` shows as bytes that may be changed: scales and codes, [count, L, ...].

        A change is gone with the next read into the buffer.
        """
        layers = max(1, self.layout.layers)
        scales, codes = self._wire_scales[:count], self._wire_codes[:count]
        return (
            scales.reshape(count, layers, scales.shape[1] // layers),
            codes.reshape(count, layers, codes.shape[1] // layers),
        )

    def rows(self, count: int) -> Floats:
        """Return the decoded rows of the first `count` records, float32 [count, L, W]."""
        layout = self.layout
        scales, codes = self._wire_scales[:count], self._wire_codes[:count]
        rows = decode_wire(layout.codec.wire, scales, codes, layout.codec.group)
        return rows.reshape(count, layout.layers, layout.width)

    def _parts_of(self, scales_bytes: int, codes_bytes: int) -> list[list[memoryview]]:
        """Return the parts of every slot, for a variant with that much in them."""
        room = (self._embedding, self._scales[:, :scales_bytes], self._codes[:, :codes_bytes])
        used = [part for part in room if part.shape[1]]
        return [[part[slot].data for part in used] for slot in range(self.capacity)]

    def _transcode(self, slots: slice | NDArray[np.int64], variant: int) -> None:
        scales_bytes, codes_bytes = self._sizes[variant]
        wire_scales, wire_codes = self._wire_scales[slots], self._wire_codes[slots]
        self._codecs[variant].transcode(
            self._scales[slots, :scales_bytes],
            self._codes[slots, :codes_bytes],
            wire_scales,
            wire_codes,
        )
        if not isinstance(slots, slice):  # scattered slots were copied
            self._wire_scales[slots], self._wire_codes[slots] = wire_scales, wire_codes


def checksum_seed(identity: str) -> int:
    """Return the seed that ties checksums to a model: the first 8 bytes of its digest.

    `identity` is "sha256:<64 hex digits>"; the bytes are read as a little-endian integer.
    """
    digest = bytes.fromhex(identity.removeprefix("sha256:"))
    return int.from_bytes(digest[:8], "little")


def record_checksum(parts: Iterable[memoryview], token: int, seed: int) -> int:
    """Return the checksum of a record of `parts` (without padding) that belongs to `token`.

    The token id is mixed into the seed, so that a valid record in the wrong place is detected.
    """
    digest = xxh3_64(seed=seed ^ token)
    for part in parts:
        digest.update(part)
    return digest.intdigest()


@dataclass(frozen=True, slots=True)
class Section:
    """Records that are alike, one behind the other."""

    start: int  # in the file
    layout: RecordLayout
    count: int
    first: int  # how many records lie in sections before

    @property
    def end(self) -> int:
        """The first byte behind the records."""
        return self.start + self.count * self.layout.stride


def sections(layout: RecordLayout, vocab_size: int, start: int) -> Iterator[Section]:
    """Return the sections of a table whose records begin at byte `start`, in their order."""
    first = 0
    for variant, count in zip(layout.variants, layout.counts(vocab_size), strict=True):
        section = Section(start, variant, count, first)
        yield section
        start, first = section.end, first + count


def record_region(layout: RecordLayout, vocab_size: int, start: int, most: int) -> Region:
    """Return where readers find records, of each of which at most `most` bytes are read."""
    stride = layout.stride if layout.codec.classes is None else layout.alignment
    return Region(start, layout.records_bytes(vocab_size), most, stride)


def record_places(layout: RecordLayout, vocab_size: int, start: int) -> Places:
    """Return the function that finds the records of tokens; ids must be in the vocabulary.

    Takes `PLACE_BYTES` of memory per token where classes of tokens differ, nothing otherwise.
    """
    if layout.codec.class_of is None:
        stride = layout.stride
        return lambda tokens: ([start + token * stride for token in tokens], [0] * len(tokens))
    offsets = np.empty(vocab_size, np.int64)
    order = layout.stored_order(vocab_size)
    for each in sections(layout, vocab_size, start):
        tokens = order[each.first : each.first + each.count]
        offsets[tokens] = np.arange(each.start, each.end, each.layout.stride)
    offset_of, class_of = offsets.data, layout.codec.class_of.data
    return lambda tokens: (
        [offset_of[token] for token in tokens],
        [class_of[token] for token in tokens],
    )
