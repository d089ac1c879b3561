"""A graph's messages back as bytes, by the table that `graph_file` reads them with."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from edge_memllm_runtimes.graph_file import (
    FIELD_BYTES,
    FIXED32,
    FLOAT,
    INT,
    MESSAGES,
    SPAN,
    TEXT,
    VARINT,
)


def write_message(kind: str, fields: dict[str, Any], data: bytes) -> bytes:
    """Return a message of a kind in `MESSAGES` as protobuf spells it.

    A span is a pair of places in ``data``, or bytes.
    """
    parts: list[bytes] = []
    for number, (name, each, repeated) in MESSAGES[kind].items():
        if name in fields:
            for value in fields[name] if repeated else [fields[name]]:
                parts += _field(number, each, value, data)
    return b"".join(parts)


def _field(number: int, kind: str, value: Any, data: bytes) -> Iterator[bytes]:
    if kind == INT:
        yield _varint(number << 3 | VARINT)
        yield _varint(value & (1 << 64) - 1)
    elif kind == FLOAT:
        yield _varint(number << 3 | FIXED32)
        yield struct.pack("<f", value)
    else:
        content = _content(kind, value, data)
        yield _varint(number << 3 | FIELD_BYTES)
        yield _varint(len(content))
        yield content


def _content(kind: str, value: Any, data: bytes) -> bytes:
    if kind == TEXT:
        text: bytes = value.encode("utf-8")
        return text
    if kind == SPAN:
        return value if isinstance(value, bytes) else data[value[0] : value[1]]
    return write_message(kind, value, data)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
