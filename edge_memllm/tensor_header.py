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
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_memllm.checked_values import Fields
from edge_memllm.errors import ArtifactError
from edge_memllm.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object

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
        if found.get("format_version") != self.version:
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
