"""The head of a GGUF file: its metadata and where each tensor lies. Trusts no byte of it.

The reader of the `gguf` library takes each number of an array for an object of its own, seconds and
hundreds of megabytes for a vocabulary, and goes on for ever where a file says it has more than it
has. So the head is read here, with the library's constants, and every length is checked before it
is followed. Says nothing of what the values mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from numpy.typing import NDArray

from edge_memllm.errors import ExportError

VERSIONS = (2, 3)  # the first wrote lengths in 32 bits and is not found any more
# Of what the largest known files have, about four times as much.
MOST_ELEMENTS = 1 << 22  # of one array: a vocabulary has 262,144 tokens, with as many merges
MOST_ENTRIES = 1 << 16
MOST_LETTERS = 1 << 22  # of one text: chat templates have thousands
_MOST_AXES = 4

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS: Mapping[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("<u1"),
}
_DAMAGED = "The file is damaged or only part of it was copied: get it again."


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, and how it is written.

    Attributes:
        name: What the file calls it.
        kind: The type of its blocks.
        shape: Its axes as transformers orders them, the innermost last.
        offset: Of its first byte, from the beginning of the file.
        size: In bytes.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the weights.

    Attributes:
        metadata: Values by their keys: int, float, bool, str, list of str, or an array of numbers
            (bool for truth values). Numbers of 32 bits are floats that their shortest decimal
            gives, 1e-05 rather than 9.999999747378752e-06.
        tensors: By name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(data: memoryview, where: str) -> GGUFHeader:
    """Read the head of the file whose bytes are `data`; errors begin with `where`.

    Raises:
        ExportError: The file is none, is damaged, of another version or of another byte order.
    """
    cursor = _Cursor(data, where)
    _check_version(cursor)
    tensor_count = cursor.count("tensors", MOST_ENTRIES)
    entry_count = cursor.count("entries of metadata", MOST_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text("a key", 1 << 16)
        if key in metadata:
            cursor.refuse(f"the key {key!a:.80} stands twice.")
        metadata[key] = cursor.value(key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    return GGUFHeader(metadata, _placed(infos, cursor, _alignment(metadata, cursor)))


class _Cursor:
    """Reads one thing after the other; nothing is read that is not there."""

    def __init__(self, data: memoryview, where: str) -> None:
        self._data = data
        self._where = where
        self.at = 0

    @property
    def size(self) -> int:
        return len(self._data)

    def refuse(self, what: str, advice: str = _DAMAGED) -> NoReturn:
        raise ExportError(f"{self._where}: {what} {advice}")

    def take(self, size: int, what: str) -> memoryview:
        end = self.at + size
        if end > self.size:
            self.refuse(f"{what} ends at byte {end}, the file at {self.size}.")
        part = self._data[self.at : end]
        self.at = end
        return part

    def number(self, layout: struct.Struct, what: str) -> int:
        (found,) = layout.unpack(self.take(layout.size, what))
        return int(found)

    def count(self, what: str, most: int) -> int:
        found = self.number(_U64, f"the number of {what}")
        if found > most:
            self.refuse(f"says it has {found} {what}, expected at most {most}.")
        return found

    def text(self, what: str, most: int = MOST_LETTERS) -> str:
        size = self.number(_U64, f"the length of {what}")
        if size > most:
            self.refuse(f"{what} has {size} bytes, expected at most {most}.")
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8, byte {self.at - size} and on.")

    def value(self, key: str) -> Any:
        """The value that follows its type; what `GGUFHeader.metadata` holds."""
        kind, what = self._kind(key), f"the value of {key!a:.80}"
        if kind is GGUFValueType.STRING:
            return self.text(what)
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        return _plain(self._numbers(kind, 1, what)[0])

    def _kind(self, key: str) -> GGUFValueType:
        found = self.number(_U32, f"the type of {key!a:.80}")
        try:
            return GGUFValueType(found)
        except ValueError:
            self.refuse(f"{key!a:.80} is of type {found}, expected one of 0 to 12.")

    def _array(self, key: str) -> list[str] | NDArray[Any]:
        kind, what = self._kind(key), f"the value of {key!a:.80}"
        count = self.count(f"elements of {key!a:.80}", MOST_ELEMENTS)
        if kind is GGUFValueType.STRING:
            return [self.text(what) for _ in range(count)]
        if kind is GGUFValueType.ARRAY:
            self.refuse(f"{key!a:.80} is an array of arrays, which no known file has.")
        return self._numbers(kind, count, what)

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> NDArray[Any]:
        layout = _NUMBERS[kind]
        found = np.frombuffer(self.take(count * layout.itemsize, what), layout).copy()
        if kind is not GGUFValueType.BOOL:
            return found
        if found.max(initial=0) > 1:
            self.refuse(f"{what} is a truth value of {found.max()}, expected 0 or 1.")
        return found.astype(np.bool_)


def _plain(number: np.generic) -> int | float | bool:
    if isinstance(number, np.floating):
        return float(str(number))
    plain: int | bool = number.item()
    return plain


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.number(_U32, "the mark of a GGUF file")
    if magic != GGUF_MAGIC:
        cursor.refuse(
            f"begins with {magic.to_bytes(4, 'little')!r}, expected b'GGUF'.",
            "Give a .gguf file, or a folder of transformers.",
        )
    version = cursor.number(_U32, "the version")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        cursor.refuse(
            "is written for big-endian machines.",
            "Turn it round with gguf-convert-endian of the package gguf.",
        )
    if version not in VERSIONS:
        cursor.refuse(
            f"is of version {version} of GGUF, expected one of {', '.join(map(str, VERSIONS))}.",
            "Convert the model again with a present llama.cpp.",
        )


def _alignment(metadata: Mapping[str, Any], cursor: _Cursor) -> int:
    found = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(found) is not int or not 0 < found <= 1 << 20 or found & (found - 1):
        cursor.refuse(f"general.alignment is {found!a:.40}, expected a power of two.")
    return found


def _tensor_info(cursor: _Cursor) -> StoredTensor:
    """A tensor whose offset is still that from the first of them."""
    name = cursor.text("a tensor's name", 1 << 10)
    what = f"tensor {name!a:.80}"
    axes = cursor.number(_U32, what)
    if not 1 <= axes <= _MOST_AXES:
        cursor.refuse(f"{what} has {axes} axes, expected 1 to {_MOST_AXES}.")
    shape = tuple(cursor.number(_U64, what) for _ in range(axes))[::-1]
    number = cursor.number(_U32, what)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        cursor.refuse(
            f"{what} is of type {number}, which the gguf library here does not know.",
            "Upgrade gguf, or quantise the model to another type, Q8_0 for one.",
        )
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        cursor.refuse(
            f"{what} has the shape {list(shape)}, expected rows of whole blocks: {block}."
        )
    size = math.prod(shape) // block * block_bytes
    return StoredTensor(name, kind, shape, cursor.number(_U64, what), size)


def _placed(infos: list[StoredTensor], cursor: _Cursor, alignment: int) -> dict[str, StoredTensor]:
    start, end = -(-cursor.at // alignment) * alignment, 0
    placed: dict[str, StoredTensor] = {}
    for info in sorted(infos, key=lambda each: each.offset):
        what = f"tensor {info.name!a:.80}"
        if info.name in placed:
            cursor.refuse(f"{what} stands twice.")
        if info.offset % alignment or info.offset < end:
            cursor.refuse(
                f"{what} begins at byte {info.offset} of the weights, expected a multiple of "
                f"{alignment} from {end} on."
            )
        end = info.offset + info.size
        if start + end > cursor.size:
            cursor.refuse(f"{what} ends at byte {start + end}, the file at {cursor.size}.")
        placed[info.name] = StoredTensor(
            info.name, info.kind, info.shape, start + info.offset, info.size
        )
    return placed
