"""The codec contract: how the memory rows of one token become bytes of a record, and back.

A codec turns float rows [N, L, D] into two byte arrays per record: `scales` (empty for codecs
without groups) and `codes`. The graph is fed a wire form (see `wire`). Where the stored bytes are
not the wire form already, the codec transcodes them after reading; decoding is by definition
transcoding and then what the graph does with the wire form. Everything that decoding depends on
is in the id, or in parameters that are stored once for all tokens.
A codec knows nothing of records, files or models.

Embeddings have no wire form: `EmbeddingForm` decodes them into what the graph is fed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Bytes, Floats
from edge_memllm.codecs.wire import CodecSizes, Wire, decode_wire, wire_sizes
from edge_memllm.process.limits import available_processors

# Rows are encoded in blocks of about this many values: temporaries stay in the cache, and memory
# beyond input and output stays at a few MB however large the chunk is.
_BLOCK_VALUES = 1 << 18

# What the graph may be fed embeddings in, and the codecs whose bytes are that already.
EMBEDDING_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
_LARGEST = {name: np.float32(np.finfo(dtype).max) for name, dtype in EMBEDDING_DTYPES.items()}
PLAIN_CODECS = {"float16": "f16", "float32": "f32"}
GROUPS = (32, 64, 128, 256)  # values that may share a scale
# A decoded value may be a little larger than what was encoded, and is still to be a float16.
_FLOAT16_LIMIT = 65024.0


class UnencodableRowError(ValueError):
    """A value has no encoding: NaN, infinite, or too large. Carries its row and layer."""

    def __init__(self, row: int, layer: int, reason: str) -> None:
        super().__init__(f"row {row}, layer {layer}: {reason}")
        self.row = row
        self.layer = layer
        self.reason = reason


class Fit(Protocol):
    """Parameters being found: shown all rows once, in chunks, it holds statistics of them only.

    Rows come in the order in which a table stores them; see `TableLayout.stored_order`.
    """

    def add(self, rows: Floats, weights: Floats | None = None) -> None:
        """Take in rows [N, L, D]; `weights` [N] says how often each token occurs, None equally."""

    def parameters(self) -> bytes:
        """Return the parameters that suit the rows seen."""


class Codec(ABC):
    """One way to store rows. Instances are immutable and shared; see the module docstring."""

    id: str
    wire: Wire
    group: int | None = None  # values to a scale, where there are scales
    limit: float  # the largest magnitude that can be encoded
    transcodes: bool = False  # whether the stored bytes differ from the wire form
    searches: bool = False  # whether encoding can search for better scales

    @abstractmethod
    def bound(self, rows: Floats) -> Floats:
        """Return the largest error allowed for each value of `rows`, broadcastable to its shape.

        `abs(decode(encode(rows)) - rows) <= bound(rows)` always holds, with and without search.
        """

    @abstractmethod
    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        """Encode contiguous rows [n, L, D] whose magnitudes are within the limit."""

    @property
    def parameters(self) -> bytes:
        """What all tokens share; empty for most codecs, and where it is not known yet."""
        return b""

    @property
    def coarse(self) -> Codec | None:
        """The codec that reads the front part of the bytes alone, if there is such a part."""
        return None

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record. Raises `ValueError` for a shape it cannot store."""
        return self.wire_sizes(layers, width)

    def wire_sizes(self, layers: int, width: int) -> CodecSizes:
        """Return the bytes per record in the wire form."""
        return wire_sizes(self.wire, layers * width, self.group)

    def parameters_bytes(self, layers: int, width: int) -> int:
        """Return the bytes of the parameters shared by all tokens; 0 for most codecs."""
        return 0

    def with_parameters(self, parameters: bytes, layers: int, width: int) -> Codec:
        """Return this codec with its parameters. Raises `ValueError` for bytes that cannot be."""
        self._check_parameters(parameters, layers, width)
        return self

    def fit(self, layers: int, width: int) -> Fit:
        """Begin to find parameters. Only for codecs that have some."""
        raise NotImplementedError(f"codec {self.id} has no parameters")

    def transcode(self, scales: Bytes, codes: Bytes, out_scales: Bytes, out_codes: Bytes) -> None:
        """Write stored bytes [N, ...] of checked shapes as the wire form, [N, ...] of its sizes."""
        out_scales[:] = scales
        out_codes[:] = codes

    def encode(self, rows: Floats, *, search: bool = False) -> tuple[Bytes, Bytes]:
        """Encode rows [N, L, D] as scales [N, scales_bytes] and codes [N, codes_bytes].

        With `search`, several scales are tried for each group and the one with the smallest
        squared error is taken; codecs that cannot say so in `searches` and raise `ValueError`.
        Raises `UnencodableRowError` (a `ValueError`) for NaN, infinite and too large values,
        naming row and layer.
        """
        if search and not self.searches:
            raise ValueError(f"codec {self.id}: there are no scales to search for.")
        count, layers, width = rows.shape
        sizes = self.sizes(layers, width)
        scales = np.empty((count, sizes.scales_bytes), np.uint8)
        codes = np.empty((count, sizes.codes_bytes), np.uint8)
        step = max(1, _BLOCK_VALUES // max(1, layers * width))

        def encode_from(start: int) -> None:
            part = slice(start, start + step)
            block = np.ascontiguousarray(rows[part], np.float32)
            self._check_magnitudes(block, start)
            scales[part], codes[part] = self._encode(block, search)

        starts = range(0, count, step)
        if len(starts) == 1:
            encode_from(0)
        else:
            with ThreadPoolExecutor(available_processors()) as threads:  # numpy runs together
                for _ in threads.map(encode_from, starts):
                    pass  # the first block that cannot be encoded says so here
        return scales, codes

    def decode(self, scales: Bytes, codes: Bytes, layers: int, width: int) -> Floats:
        """Decode scales [N, scales_bytes] and codes [N, codes_bytes] to float32 [N, L, D].

        Exactly what a graph that computes in float32 makes of the wire form. Raises `ValueError`
        when the arrays do not have these sizes.
        """
        sizes, count = self.sizes(layers, width), len(codes)
        expected = ((count, sizes.scales_bytes), (count, sizes.codes_bytes))
        if (scales.shape, codes.shape) != expected:
            raise ValueError(
                f"codec {self.id}: scales {scales.shape} and codes {codes.shape}, "
                f"expected {expected[0]} and {expected[1]} for {layers} layers of {width}."
            )
        scales, codes = np.ascontiguousarray(scales), np.ascontiguousarray(codes)
        if self.transcodes:
            fed = self.wire_sizes(layers, width)
            wire_scales = np.empty((count, fed.scales_bytes), np.uint8)
            wire_codes = np.empty((count, fed.codes_bytes), np.uint8)
            self.transcode(scales, codes, wire_scales, wire_codes)
            scales, codes = wire_scales, wire_codes
        return decode_wire(self.wire, scales, codes, self.group).reshape(count, layers, width)

    def _check_group(self, width: int) -> None:
        if self.group is not None and width % self.group:
            raise ValueError(
                f"codec {self.id}: width {width} is not a multiple of the group size {self.group}."
            )

    def _check_parameters(self, parameters: bytes, layers: int, width: int) -> None:
        expected = self.parameters_bytes(layers, width)
        if len(parameters) != expected:
            raise ValueError(
                f"codec {self.id}: {len(parameters)} bytes of parameters, expected {expected} "
                f"for {layers} layers of {width}."
            )

    def _check_magnitudes(self, rows: Floats, start: int) -> None:
        storable = np.abs(rows) <= self.limit  # False for NaN
        if not storable.all():
            row, layer, column = np.argwhere(~storable)[0].tolist()
            value = float(rows[row, layer, column])
            raise UnencodableRowError(
                start + row,
                layer,
                f"{value:g} cannot be stored, codec {self.id} holds magnitudes "
                f"up to {self.limit:g}",
            )


class NoneCodec(Codec):
    """Stores rows [N, 0, D], that is, nothing."""

    id = "none"
    wire: Wire = "none"
    limit = 0.0

    def sizes(self, layers: int, width: int) -> CodecSizes:
        """Return zero bytes. Raises `ValueError` when there are memory layers to store."""
        if layers:
            raise ValueError(f"codec none: stores no memory rows, but there are {layers} layers.")
        return CodecSizes(scales_bytes=0, codes_bytes=0)

    def bound(self, rows: Floats) -> Floats:
        """Return zero: there is nothing to get wrong."""
        return np.zeros_like(rows)

    def _encode(self, rows: Floats, search: bool) -> tuple[Bytes, Bytes]:
        nothing = np.empty((len(rows), 0), np.uint8)
        return nothing, nothing


@dataclass(frozen=True, slots=True)
class EmbeddingForm:
    """Embeddings of `width` values in a codec, each stored as one row: scales, then codes.

    A graph is fed that decoded on the host and rounded to `dtype`.
    Raises `ValueError` for values that do not fit together.
    """

    width: int  # D
    dtype: str  # "float16" or "float32"
    codec: Codec
    _scales_bytes: int = field(init=False, repr=False, compare=False)  # of one embedding

    def __post_init__(self) -> None:
        if self.dtype not in EMBEDDING_DTYPES:
            raise ValueError(
                f"embedding dtype '{self.dtype}', expected one of {', '.join(EMBEDDING_DTYPES)}."
            )
        sizes = self.codec.sizes(1, self.width)
        object.__setattr__(self, "_scales_bytes", sizes.scales_bytes)

    @property
    def plain(self) -> bool:
        """Whether the graph is fed the stored bytes."""
        return self.codec.id == PLAIN_CODECS[self.dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes of an embedding in a record."""
        sizes = self.codec.sizes(1, self.width)
        return sizes.scales_bytes + sizes.codes_bytes

    @property
    def fed_bytes(self) -> int:
        """Bytes of an embedding as the graph is fed it."""
        return self.width * EMBEDDING_DTYPES[self.dtype].itemsize

    def bound(self, embedding: Floats) -> Floats:
        """Return how far each value of embeddings [N, D], fed to the graph, may be off."""
        error = self.codec.bound(embedding[:, None])[:, 0]
        if self.plain or self.dtype == "float32":
            return error
        reach = np.abs(embedding) + error
        half_units: Floats = np.maximum(reach * np.float32(2.0**-11), np.float32(2.0**-25))
        return error + half_units

    def encode(self, embedding: Floats) -> Bytes:
        """Return embeddings [N, D] as stored, [N, stored_bytes].

        Raises `UnencodableRowError` for NaN, infinite and too large values, naming the row.
        """
        scales, codes = self.codec.encode(embedding[:, None])
        if not self.plain and self.dtype == "float16":
            _check_magnitudes(embedding)
        return np.concatenate([scales, codes], axis=1)

    def decode(self, stored: Bytes) -> NDArray[Any]:
        """Return what the graph is fed, [N, D] of its dtype, for stored bytes [N, stored_bytes]."""
        scales, codes = stored[:, : self._scales_bytes], stored[:, self._scales_bytes :]
        with np.errstate(over="ignore", invalid="ignore"):  # bytes that no writer made
            values = self.codec.decode(scales, codes, 1, self.width)[:, 0]
            # Half a step beyond the largest number stored may be beyond the largest there is.
            most = _LARGEST[self.dtype]
            return values.clip(-most, most).astype(EMBEDDING_DTYPES[self.dtype], copy=False)


def _check_magnitudes(embedding: Floats) -> None:
    large = np.abs(embedding) > _FLOAT16_LIMIT
    if large.any():
        row, column = np.argwhere(large)[0].tolist()
        raise UnencodableRowError(
            row,
            0,
            f"{embedding[row, column]:g} cannot be stored, embeddings in float16 hold magnitudes "
            f"up to {_FLOAT16_LIMIT:g}",
        )
