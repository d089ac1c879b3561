"""Headers of safetensors files that something else determines whole: of tables, overlays, sessions.

Writing builds one; reading builds it again and compares, so that nothing in it is believed. It is
JSON behind its length, padded with spaces. Knows dtypes and shapes, nothing of what they mean.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.layout import TableLayout
from edge_memllm.artifact.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object
from edge_memllm.checked_values import Fields
from edge_memllm.errors import ArtifactError, CorruptionError

LENGTH = struct.Struct("<Q")  # what a safetensors file starts with: the bytes of its header
PAGE = 4096
UNSEALED = "0" * 64  # in the place of a digest that covers the header as well
DIGEST = re.compile(r"[0-9a-f]{64}")

Tensors: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

_CODES = {
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "float16": "F16",
    "float32": "F32",
}

FORMAT = "edge-memllm-table"
FORMAT_VERSION = "1"

_BYTE, _CHECKSUM = np.dtype("u1"), np.dtype("<u8")


def header_content(metadata: Mapping[str, str], tensors: Tensors) -> dict[str, dict[str, object]]:
    """Return what a header says: its metadata, and each tensor right behind the one before."""
    content: dict[str, dict[str, object]] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (kind, shape) in tensors.items():
        end = start + array_bytes(kind, shape)
        content[name] = {
            "dtype": _CODES[kind.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    return content


def header_bytes(metadata: Mapping[str, str], tensors: Tensors, unit: int) -> bytes:
    """Return length, JSON, and spaces up to a multiple of `unit` bytes."""
    content = compact(header_content(metadata, tensors)).encode("ascii")
    room = -(-(LENGTH.size + len(content)) // unit) * unit - LENGTH.size
    return LENGTH.pack(room) + content.ljust(room)


def compact(value: object) -> str:
    """Return the one JSON text that a value has in a header."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def array_bytes(kind: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return the bytes of an array."""
    return kind.itemsize * math.prod(shape)


def data_bytes(tensors: Tensors) -> int:
    """Return the bytes behind a header."""
    return sum(array_bytes(*each) for each in tensors.values())


def tensor_views(data: Any, position: int, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """Return views of a mapped file, whose header ends at `position`."""
    arrays = {}
    for name, (kind, shape) in tensors.items():
        arrays[name] = np.frombuffer(data, kind, math.prod(shape), position).reshape(shape)
        position += array_bytes(kind, shape)
    return arrays


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file whose header is the one that its metadata make, to the byte.

    The last four are words for whoever meets another file.
    """

    format: str
    version: str
    name: str  # "overlay"
    meaning: str  # "an overlay"
    advice: str  # what makes one
    anew: str  # "make the overlay again"
    earlier: tuple[str, ...] = ()  # versions that are read, too

    def read(self, stream: BufferedReader, size: int, where: str) -> bytes:
        """Return the header at the beginning of a file of `size` bytes: length and JSON.

        Raises `ArtifactError` when there is none.
        """
        first = stream.read(LENGTH.size)
        length = LENGTH.unpack(first)[0] if len(first) == LENGTH.size else 0
        if not 0 < length <= min(MAX_JSON_BYTES, size - LENGTH.size):
            raise ArtifactError(
                f"{where}: this is not {self.meaning}: {size} bytes, {length} of them said to be "
                "a header."
            )
        return first + stream.read(length)

    def metadata(self, header: bytes, where: str, keys: tuple[str, ...]) -> Fields:
        """Return the metadata of a header; `keys` come behind format and version.

        Raises `ArtifactError` for another format, version or keys.
        """
        if not header.startswith(b"{", LENGTH.size):
            raise ArtifactError(f"{where}: this is not {self.meaning}: no JSON at its beginning.")
        found = parse_json_object(header[LENGTH.size :], where).get("__metadata__")
        if not isinstance(found, dict) or found.get("format") != self.format:
            raise ArtifactError(
                f"{where}: this is not {self.meaning} (no format '{self.format}'). {self.advice}"
            )
        if found.get("format_version") not in (self.version, *self.earlier):
            raise ArtifactError(
                f"{where}: {self.name} format version {found.get('format_version')!a:.20}, this "
                f"version reads '{self.version}'. Upgrade edge-memllm or {self.anew}."
            )
        return exact_fields(found, f"{where}: __metadata__", ("format", "format_version", *keys))

    def check_same(self, header: bytes, built: bytes, where: str) -> None:
        """Raise `ArtifactError` unless a header is the one built from what it says."""
        if header != built:
            raise ArtifactError(
                f"{where}: the header is not the one that its metadata make: other tensors, "
                f"places or spelling. Copy the file again, or {self.anew}."
            )


def build_header(layout: TableLayout, vocab_size: int, identity: str) -> bytes:
    """Return the bytes in front of the first record: length, JSON and padding."""
    metadata, tensors = _metadata(layout, identity), _tensors(layout, vocab_size)
    return header_bytes(metadata, tensors, max(PAGE, layout.alignment))


def header_length(first: bytes, records_offset: int, where: str) -> int:
    """Return the length of the JSON, from the first 8 bytes of the file.

    Raises `CorruptionError` unless the records start right behind it, where the manifest says.
    """
    length: int = LENGTH.unpack(first)[0]
    if LENGTH.size + length != records_offset or length > MAX_JSON_BYTES:
        raise CorruptionError(
            f"{where}: the header is {length} bytes, expected {records_offset - LENGTH.size} "
            f"and at most {MAX_JSON_BYTES}. Copy the folder again."
        )
    return length


def check_header(
    data: bytes, layout: TableLayout, vocab_size: int, identity: str, where: str
) -> None:
    """Compare the JSON of a header with what it must say for this model.

    Raises `ArtifactError` naming the first difference: another model, codec, version, or tensors
    of other names, types, shapes or places.
    """
    expected = header_content(_metadata(layout, identity), _tensors(layout, vocab_size))
    if not data.startswith(b"{"):
        raise ArtifactError(f"{where}: the header does not start with '{{'. Copy the folder again.")
    header = parse_json_object(data, where)
    found = exact_fields(header, where, expected).mapping("__metadata__")
    exact_fields(found, f"{where}: __metadata__", expected["__metadata__"])
    if found["identity"] != identity:
        raise ArtifactError(
            f"{where}: this is the table of model {_shortened(found['identity'])}, the manifest is "
            f"for model {_shortened(identity)}. The files are from different exports; copy the "
            "folder again."
        )
    for key, value in expected["__metadata__"].items():
        _compare(found[key], value, key, where)
    for name, tensor in expected.items():
        if name != "__metadata__":
            _compare(header[name], tensor, f"tensor '{name}'", where)


def _tensors(layout: TableLayout, vocab_size: int) -> Tensors:
    """Return what stands behind the header, in the order of the file."""
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    counts = layout.counts(vocab_size)
    for number, (kind, count) in enumerate(zip(layout.kinds, counts, strict=True)):
        name = f"records.{number}" if layout.classes else "records"
        tensors[name] = (_BYTE, (count, kind.stride))
    columns = layout.checksums
    tensors["checksums"] = (_CHECKSUM, (vocab_size,) if columns == 1 else (vocab_size, columns))
    if size := layout.parameters_bytes:
        tensors["parameters"] = (_BYTE, (size,))
    return tensors


def _metadata(layout: TableLayout, identity: str) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": identity,
        "codec": layout.codec_id,
        "embedding_dtype": layout.embedding_dtype,
        "layers": str(layout.layers),
        "width": str(layout.embedding_width),
        "alignment": str(layout.alignment),
    }
    if layout.layers and layout.width != layout.embedding_width:
        metadata["row_width"] = str(layout.width)
    if layout.embedding_codec is not None:
        metadata["embedding_codec"] = layout.embedding_codec
    if layout.classes:  # as text, since metadata of safetensors is nothing else
        metadata["classes"] = compact([asdict(each) for each in layout.classes])
    return metadata


def _shortened(identity: object) -> str:
    return ascii(identity).strip("'")[: len("sha256:") + 12]


def _compare(found: object, expected: object, what: str, where: str) -> None:
    # Compared as text: in Python True equals 1 and 1.0 equals 1, in the file they must not.
    shown, wanted = json.dumps(found, sort_keys=True), json.dumps(expected, sort_keys=True)
    if shown != wanted:
        raise ArtifactError(
            f"{where}: {what} is {shown:.200}, the manifest says {wanted:.200}. "
            "The table is from another export; copy the folder again."
        )
