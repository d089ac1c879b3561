"""One token's record: where its parts lie, its checksum, and the buffer records are read into.

    embedding of D values | scales of all layers | codes of all layers | zeros up to the stride

Knows codecs and numpy; knows nothing of files, manifests or models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from edge_memllm.codecs.codec import Codec, Floats

EMBEDDING_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
ALIGNMENTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

WireArrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The byte layout shared by all records of a table.

    `layers` counts the layers that have memory rows: 0 for the dense model, whose codec is "none".
    Raises `ValueError` for values that do not fit together.
    """

    layers: int
    width: int
    codec: Codec
    embedding_dtype: str  # "float16" or "float32"
    alignment: int = 512

    def __post_init__(self) -> None:
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
        return self.width * EMBEDDING_DTYPES[self.embedding_dtype].itemsize

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


class RecordBuffer:
    """Room for `capacity` records, allocated once; reads scatter into it without a copy.

    The views it returns share its memory: they are valid until the next read into the buffer.
    """

    def __init__(self, layout: RecordLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self._embedding = np.zeros((capacity, layout.embedding_bytes), np.uint8)
        self._scales = np.zeros((capacity, layout.scales_bytes), np.uint8)
        self._codes = np.zeros((capacity, layout.codes_bytes), np.uint8)
        used = [part for part in (self._embedding, self._scales, self._codes) if part.shape[1]]
        self._parts = [[part[slot].data for part in used] for slot in range(capacity)]

    def parts(self, slot: int) -> list[memoryview]:
        """Return the writable byte ranges of one record, in record order."""
        return self._parts[slot]

    def embedding(self, count: int) -> NDArray[Any]:
        """Return the embeddings of the first `count` records, [count, D] in their stored dtype."""
        return self._embedding[:count].view(EMBEDDING_DTYPES[self.layout.embedding_dtype])

    def wire(self, count: int) -> WireArrays:
        """Return what the graph is fed for the first `count` records, by graph input name."""
        codes, scales = self._codes[:count], self._scales[:count]
        match self.layout.codec.wire:
            case "none":
                return {}
            case "f32":
                return {"memory_rows": codes.view("<f4")}
            case "f16":
                return {"memory_rows": codes.view("<f2")}
            case "q8" | "q4":
                return {"memory_codes": codes, "memory_scales": scales.view("<f2")}

    def rows(self, count: int) -> Floats:
        """Return the decoded rows of the first `count` records, float32 [count, L, D]."""
        layout = self.layout
        scales, codes = self._scales[:count], self._codes[:count]
        return layout.codec.decode(scales, codes, layout.layers, layout.width)


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
