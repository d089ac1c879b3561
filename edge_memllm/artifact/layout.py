"""One token's record: where its parts lie, its checksum, and the buffer records are read into.

    embedding | scales of all layers | codes of all layers | zeros up to the stride

The embedding has a codec of its own (`edge_memllm.codecs.codec.EmbeddingForm`).

A codec with a coarse part has it in front: its record is the start of the whole one. Where classes
of tokens differ, each class has a section of the table to itself. Knows codecs and numpy; knows
nothing of files, manifests or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from edge_memllm.arrays import Bytes, Floats, Ids
from edge_memllm.codecs import EMBEDDING_DTYPES, EmbeddingForm, embedding_form
from edge_memllm.codecs.codec import Codec, Fit
from edge_memllm.codecs.layered import TokenClass
from edge_memllm.codecs.wire import CodecSizes, Wire, decode_wire, wire_sizes
from edge_memllm.readers import Region

CHECKSUM_BYTES = 8
ALIGNMENTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

WireArrays = dict[str, NDArray[Any]]

# For token ids: where their records begin in the file, and the section that each is in.
Offsets = Callable[[Sequence[int]], tuple[list[int], list[int]]]


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


class TableLayout(ABC):
    """How the records of a table lie: in sections, in each of which they are alike.

    `RecordLayout` is a table of one section, `edge_memllm.artifact.sections.MixedLayout` one of
    several. All are fed to the graph in one wire form.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # fields of a dataclass or properties; what is there keeps it from fields

        @property
        def layers(self) -> int:
            """Memory rows of a token."""

        @property
        def width(self) -> int:
            """W, the values of a row."""

        @property
        def embedding_width(self) -> int:
            """D, the values of the embedding."""

        @property
        def embedding_dtype(self) -> str:
            """The dtype that the graph is fed embeddings in, "float16" or "float32"."""

        @property
        def embedding_codec(self) -> str | None:
            """The id of the codec that embeddings are stored in; None where they are as fed."""

        @property
        def embedding(self) -> EmbeddingForm:
            """How embeddings are stored and fed."""

        @property
        def alignment(self) -> int:
            """What strides are multiples of."""

        @property
        def kinds(self) -> tuple[RecordLayout, ...]:
            """The records of each section, which lie in this order."""

        @property
        def classes(self) -> tuple[TokenClass, ...]:
            """What a manifest says of several sections; nothing of a single one."""

    @property
    @abstractmethod
    def codec_id(self) -> str:
        """The word for how rows are stored, as manifest and header say it."""

    @property
    @abstractmethod
    def record_bytes(self) -> int:
        """Bytes of one record without padding, of the largest where they differ."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Bytes from one record to the next, in the section of the largest."""

    @property
    @abstractmethod
    def spacing(self) -> int:
        """What the distance of any two records is a multiple of."""

    @property
    @abstractmethod
    def coarse(self) -> RecordLayout | None:
        """The layout of the front part that can be read alone, if there is one."""

    @property
    @abstractmethod
    def parameters(self) -> bytes:
        """What all tokens share, as stored once per table; empty where it is not known yet."""

    @property
    @abstractmethod
    def parameters_bytes(self) -> int:
        """Bytes of the parameters."""

    @abstractmethod
    def with_parameters(self, parameters: bytes) -> Self:
        """Return this layout with its parameters. Raises `ValueError` for wrong ones."""

    @abstractmethod
    def fit(self) -> Fit:
        """Begin to find parameters from rows in the stored order."""

    @abstractmethod
    def counts(self, vocab_size: int) -> tuple[int, ...]:
        """Return how many tokens each section has."""

    @abstractmethod
    def sections_of(self, ids: Ids) -> NDArray[np.uint8]:
        """Return the section that each of some tokens is in."""

    @abstractmethod
    def stored_order(self, vocab_size: int) -> Ids:
        """Return all token ids in the order of their records: section by section, then by id."""

    @abstractmethod
    def offsets(self, vocab_size: int, start: int) -> Offsets:
        """Return the function that finds the records of tokens; ids must be in the vocabulary.

        `start` is where the first record begins.
        """

    @abstractmethod
    def offsets_bytes(self, vocab_size: int) -> int:
        """Bytes of memory that `offsets` takes."""

    @property
    def wire(self) -> Wire:
        """The form that the graph is fed."""
        return self.kinds[0].codec.wire

    @property
    def group(self) -> int | None:
        """Values to a scale in that form, where there are scales."""
        return self.kinds[0].codec.group

    @property
    def transcodes(self) -> bool:
        """Whether the stored bytes differ from the form that the graph is fed."""
        return self.kinds[0].codec.transcodes

    @property
    def searches(self) -> bool:
        """Whether encoding can search for better scales, in some section."""
        return any(each.codec.searches for each in self.kinds)

    @property
    def checksums(self) -> int:
        """Checksums per record: one of the whole, before it one of the part read alone."""
        return 1 if self.coarse is None else 2

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding in a record."""
        return self.embedding.stored_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes that a buffer takes per record: as stored, and what is fed in another form."""
        embedding, rows = self.embedding, self.wire_sizes
        room = embedding.stored_bytes + sum(self.widest)
        if not embedding.plain:
            room += embedding.fed_bytes
        return room + rows.scales_bytes + rows.codes_bytes if self.transcodes else room

    @property
    def fed_bytes(self) -> int:
        """Bytes that the graph is fed per record."""
        fed = self.wire_sizes
        return self.embedding.fed_bytes + fed.scales_bytes + fed.codes_bytes

    @property
    def wire_sizes(self) -> CodecSizes:
        """Bytes of scales and codes that the graph is fed per record."""
        return wire_sizes(self.wire, self.layers * self.width, self.group)

    @property
    def widest(self) -> tuple[int, int]:
        """The most bytes of scales, and the most bytes of codes, that any record has."""
        scales, codes = zip(*((k.scales_bytes, k.codes_bytes) for k in self.kinds), strict=True)
        return max(scales), max(codes)

    def with_codec(self, codec: Codec) -> RecordLayout:
        """Return the layout of a table like this one whose rows are all stored by one codec.

        Raises `ValueError` for a codec that cannot store them.
        """
        return RecordLayout(
            self.layers,
            self.width,
            codec,
            self.embedding_dtype,
            self.alignment,
            self.embedding_width,
            self.embedding_codec,
        )

    def size_of(self, token: int) -> int:
        """Return the bytes of a token's record without padding."""
        section: int = self.sections_of(np.array([token])).tolist()[0]
        return self.kinds[section].record_bytes

    def sections(self, vocab_size: int, start: int) -> Iterator[Section]:
        """Return the sections of a table whose records begin at byte `start`, in their order."""
        first = 0
        for kind, count in zip(self.kinds, self.counts(vocab_size), strict=True):
            section = Section(start, kind, count, first)
            yield section
            start, first = section.end, first + count

    def region(self, vocab_size: int, start: int, most: int) -> Region:
        """Return where readers find records, of each of which at most `most` bytes are read."""
        return Region(start, self.records_bytes(vocab_size), most, self.spacing)

    def records_bytes(self, vocab_size: int) -> int:
        """Bytes of all records, padding included."""
        counts = self.counts(vocab_size)
        return sum(count * each.stride for count, each in zip(counts, self.kinds, strict=True))

    def payload_bytes(self, vocab_size: int) -> int:
        """Bytes of what is needed: records without padding, and the parameters."""
        counts = self.counts(vocab_size)
        records = zip(counts, self.kinds, strict=True)
        return sum(count * each.record_bytes for count, each in records) + self.parameters_bytes

    def table_bytes(self, vocab_size: int) -> int:
        """Bytes of a table file from the first record on: records, checksums, parameters."""
        checksums = vocab_size * self.checksums * CHECKSUM_BYTES
        return self.records_bytes(vocab_size) + checksums + self.parameters_bytes


@dataclass(frozen=True, slots=True)
class RecordLayout(TableLayout):
    """The byte layout of records that are alike: those of a section, or of a whole table.

    `layers` counts the memory rows of a token: 0 for a model without, whose codec is "none".
    Raises `ValueError` for values that do not fit together.
    """

    layers: int
    width: int  # W, of a row
    codec: Codec
    embedding_dtype: str  # "float16" or "float32", of what the graph is fed
    alignment: int = 512
    embedding_width: int = 0  # D; 0 stands for that of a row
    embedding_codec: str | None = None  # an id; None stands for the dtype that the graph is fed
    embedding: EmbeddingForm = field(init=False, repr=False, compare=False)  # of these three

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedding_width", self.embedding_width or self.width)
        form = embedding_form(self.embedding_width, self.embedding_dtype, self.embedding_codec)
        object.__setattr__(self, "embedding", form)
        if form.plain:
            object.__setattr__(self, "embedding_codec", None)
        if self.alignment not in ALIGNMENTS:
            raise ValueError(
                f"alignment {self.alignment}, expected a power of two from {ALIGNMENTS[0]} "
                f"to {ALIGNMENTS[-1]}."
            )
        if self.layers == 0 and self.codec.id != "none":
            raise ValueError(f"codec {self.codec.id} without memory layers, expected codec none.")
        self.codec.sizes(self.layers, self.width)

    @property
    def codec_id(self) -> str:
        """The codec's id."""
        return self.codec.id

    @property
    def kinds(self) -> tuple[RecordLayout, ...]:
        """This one alone."""
        return (self,)

    @property
    def classes(self) -> tuple[TokenClass, ...]:
        """Nothing: all tokens are alike."""
        return ()

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

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.record_bytes // self.alignment) * self.alignment

    @property
    def spacing(self) -> int:
        """The stride."""
        return self.stride

    @property
    def coarse(self) -> RecordLayout | None:
        """The layout of the front part that can be read alone, if there is one."""
        codec = self.codec.coarse
        return None if codec is None else replace(self, codec=codec)

    @property
    def parameters(self) -> bytes:
        """Those of the codec."""
        return self.codec.parameters

    @property
    def parameters_bytes(self) -> int:
        """Bytes of the codec's parameters."""
        return self.codec.parameters_bytes(self.layers, self.width)

    def with_parameters(self, parameters: bytes) -> Self:
        """Return this layout with its codec's parameters. Raises `ValueError` for wrong ones."""
        codec = self.codec.with_parameters(parameters, self.layers, self.width)
        return replace(self, codec=codec)

    def fit(self) -> Fit:
        """Begin to find the codec's parameters."""
        return self.codec.fit(self.layers, self.width)

    def counts(self, vocab_size: int) -> tuple[int, ...]:
        """Return that all tokens are in one section."""
        return (vocab_size,)

    def sections_of(self, ids: Ids) -> NDArray[np.uint8]:
        """Return zeros."""
        return np.zeros(len(ids), np.uint8)

    def size_of(self, token: int) -> int:
        """Return the bytes of any record without padding."""
        return self.record_bytes

    def stored_order(self, vocab_size: int) -> Ids:
        """Return 0, 1, 2, ..."""
        return np.arange(vocab_size)

    def offsets(self, vocab_size: int, start: int) -> Offsets:
        """Return the function that finds the records of tokens, by their stride."""
        stride = self.stride
        return lambda tokens: ([start + token * stride for token in tokens], [0] * len(tokens))

    def offsets_bytes(self, vocab_size: int) -> int:
        """Nothing: they are computed."""
        return 0


class RecordBuffer:
    """Room for `capacity` records, allocated once; reads scatter into it without a copy.

    Where the stored form is not what the graph is fed, there is room for both, and `transcode`
    fills one from the other; decoding starts from what the graph is fed as well. The views it
    returns share its memory: they are valid until the next read into the buffer.
    """

    def __init__(self, layout: TableLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        scales_bytes, codes_bytes = layout.widest
        self._form = layout.embedding
        self._embedding = np.zeros((capacity, self._form.stored_bytes), np.uint8)
        self._fed_embedding = self._embedding
        if not self._form.plain:
            self._fed_embedding = np.zeros((capacity, self._form.fed_bytes), np.uint8)
        self._scales = np.zeros((capacity, scales_bytes), np.uint8)
        self._codes = np.zeros((capacity, codes_bytes), np.uint8)
        self._wire_scales, self._wire_codes = self._scales, self._codes
        self._wire, self._group, self._transcodes = layout.wire, layout.group, layout.transcodes
        if self._transcodes:
            fed = layout.wire_sizes
            self._wire_scales = np.zeros((capacity, fed.scales_bytes), np.uint8)
            self._wire_codes = np.zeros((capacity, fed.codes_bytes), np.uint8)
        self._codecs = [each.codec for each in layout.kinds]
        self._sizes = [(each.scales_bytes, each.codes_bytes) for each in layout.kinds]
        self._parts = [self._parts_of(*sizes) for sizes in self._sizes]

    def parts(self, slot: int, section: int = 0) -> list[memoryview]:
        """Return the writable byte ranges of one record of a section, in record order."""
        return self._parts[section][slot]

    def transcode(self, count: int, sections: Sequence[int] | None = None) -> None:
        """Bring the first `count` records into the form the graph is fed, if they are not in it.

        In slot i is a record of the section `sections[i]`; None where there is only one.
        """
        if self._fed_embedding is not self._embedding:
            self.embedding(count)[:] = self._form.decode(self._embedding[:count])
        if not self._transcodes:
            return
        found = [0] if sections is None else sorted(set(sections))
        if len(found) == 1:
            self._transcode(slice(count), found[0])
            return
        each = np.array(sections)
        for section in found:
            self._transcode(np.flatnonzero(each == section), section)

    def embedding(self, count: int) -> NDArray[Any]:
        """Return the embeddings of the first `count` records, [count, D] as the graph is fed."""
        return self._fed_embedding[:count].view(EMBEDDING_DTYPES[self._form.dtype])

    def stored_embedding(self, count: int) -> Bytes:
        """Return the embeddings of the first `count` records as they are stored."""
        return self._embedding[:count]

    def wire(self, count: int) -> WireArrays:
        """Return what the graph is fed for the first `count` records, by graph input name."""
        codes, scales = self._wire_codes[:count], self._wire_scales[:count]
        match self._wire:
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
        rows = decode_wire(self._wire, scales, codes, self._group)
        return rows.reshape(count, layout.layers, layout.width)

    def _parts_of(self, scales_bytes: int, codes_bytes: int) -> list[list[memoryview]]:
        """Return the parts of every slot, for a section whose records have that much in them."""
        room = (self._embedding, self._scales[:, :scales_bytes], self._codes[:, :codes_bytes])
        used = [part for part in room if part.shape[1]]
        return [[part[slot].data for part in used] for slot in range(self.capacity)]

    def _transcode(self, slots: slice | NDArray[np.int64], section: int) -> None:
        scales_bytes, codes_bytes = self._sizes[section]
        wire_scales, wire_codes = self._wire_scales[slots], self._wire_codes[slots]
        self._codecs[section].transcode(
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
