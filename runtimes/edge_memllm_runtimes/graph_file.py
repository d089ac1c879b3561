"""What a graph file refers to, read before any library loads it: metadata and outside files.

A graph may name other files to take weights from. Only the one the manifest names is allowed, so
this walks the protobuf encoding of ONNX (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto)
by itself; it skips weights without reading them and needs no onnx package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from edge_memllm.errors import ArtifactError

# message -> field number -> message: only the ways that lead to tensors and metadata.
_FIELDS = {
    "Model": {7: "Graph", 14: "Metadata", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalData"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 32
# ONNX Runtime's own: "prepacked_0" -> "kernel+hash|offset;length;checksum|offset;..."
_PACKED = "prepacked"
_MAX_TEXT = 4096
_BLOB = re.compile(r"\d{1,18};\d{1,18};[0-9A-Za-z]*")


@dataclass(slots=True)
class GraphReferences:
    """The graph's own metadata, and the names of the files it takes tensors from."""

    metadata: dict[str, str] = field(default_factory=dict)
    external_files: set[str] = field(default_factory=set)
    packed_offsets: set[int] = field(default_factory=set)  # of repacked weights in those files


def read_references(file: BinaryIO, size: int) -> GraphReferences:
    """Walk an ONNX file of `size` bytes; raises `ArtifactError` when it is not one."""
    found = GraphReferences()
    _walk(file, "Model", (0, size), 0, found)
    return found


def _walk(
    file: BinaryIO, message: str, span: tuple[int, int], depth: int, found: GraphReferences
) -> None:
    if depth > _MAX_DEPTH:
        raise _malformed("it is nested too deeply")
    for number, start, end in message_parts(file, *span):
        match inner := _FIELDS[message].get(number):
            case None:
                continue
            case "Metadata":
                found.metadata.update([text_entry(file, start, end)])
            case "ExternalData":
                key, value = text_entry(file, start, end)
                if key == "location":
                    found.external_files.add(value)
                elif key.startswith(_PACKED):
                    found.packed_offsets.update(_packed_offsets(value))
            case _:
                _walk(file, inner, (start, end), depth + 1, found)


def message_parts(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield field number, start and end of every length-delimited field of one message."""
    while start < end:
        file.seek(start)
        tag = _varint(file)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length = _varint(file)
            start = file.tell()
            if length > end - start:
                raise _malformed("a field is longer than what holds it")
            yield number, start, start + length
            start += length
        elif kind == _VARINT:
            _varint(file)
            start = file.tell()
        elif kind in (_FIXED32, _FIXED64):
            start = file.tell() + (4 if kind == _FIXED32 else 8)
        else:
            raise _malformed(f"it has a field of kind {kind}")
    if start != end:
        raise _malformed("it ends inside a field")


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _malformed("it ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _malformed("a number is too long")


def text_entry(file: BinaryIO, start: int, end: int) -> tuple[str, str]:
    """Return key and value of a StringStringEntry."""
    texts = {1: "", 2: ""}
    for number, begin, stop in message_parts(file, start, end):
        if stop - begin > _MAX_TEXT:
            raise _malformed(f"a metadata text has {stop - begin} bytes")
        file.seek(begin)
        texts[number] = file.read(stop - begin).decode("utf-8", "replace")
    return texts[1], texts[2]


def _packed_offsets(text: str) -> list[int]:
    blobs = text.split("|")[1:]
    if not all(_BLOB.fullmatch(blob) for blob in blobs):
        raise _malformed(f"repacked weights at {text!a:.80}")
    return [int(blob.split(";")[0]) for blob in blobs]


def _malformed(reason: str) -> ArtifactError:
    return ArtifactError(f"not an ONNX graph: {reason}. Copy the artifact again.")
