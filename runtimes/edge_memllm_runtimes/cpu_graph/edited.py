"""A graph that is being rewritten: its messages as `graph_file` reads them, and back to bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from edge_memllm_runtimes.graph_file import (
    DATA_TYPES,
    FIELD_BYTES,
    FIXED32,
    FLOAT,
    INT,
    MESSAGES,
    SPAN,
    TEXT,
    VARINT,
    read_messages,
)

Fields = dict[str, Any]

CODES = {name: code for code, name in DATA_TYPES.items()}
_INTEGER = 2  # type of an attribute


class EditedGraph:
    """The messages of a checked graph. Whoever changes nodes keeps them in an order that runs."""

    def __init__(self, data: bytes) -> None:
        """Take the bytes of a graph that was checked."""
        self.data = data
        self._model = read_messages(data)
        graph = self._model["graph"]
        graph.pop("value_info", None)  # types that may not hold any more, and nobody needs
        self.nodes: list[Fields] = graph["node"]
        self.inputs: list[Fields] = graph["input"]
        self.outputs: list[Fields] = graph["output"]
        self.tensors: dict[str, Fields] = {each["name"]: each for each in graph["initializer"]}

    def bytes(self) -> bytes:
        """Return the graph as a file's bytes."""
        graph = self._model["graph"]
        graph["node"], graph["initializer"] = self.nodes, list(self.tensors.values())
        return write_message("model", self._model, self.data)

    def constant(self, name: str, numbers: list[int]) -> str:
        """Add a weight of integers, int64 [len(numbers)], and return its name."""
        raw = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
        fields = {"dims": [len(numbers)], "data_type": CODES["int64"], "name": name}
        self.tensors[name] = {**fields, "raw_data": raw}
        return name


def node(op_type: str, inputs: list[str], output: str, **attributes: int) -> Fields:
    """Return a node of ONNX's own operators with one output, its attributes integers."""
    fields: Fields = {"input": inputs, "output": [output], "name": output, "op_type": op_type}
    if attributes:
        fields["attribute"] = [
            {"name": name, "i": value, "type": _INTEGER} for name, value in attributes.items()
        ]
    return fields


def cast(value: str, kind: str, output: str) -> Fields:
    """Return a node that makes ``output`` of a value, in a type by its name."""
    return node("Cast", [value], output, to=CODES[kind])


def attribute(fields: Fields, name: str) -> Any:
    """Return an attribute of a node; None where it has none of that name."""
    for each in fields.get("attribute", ()):
        if each["name"] == name:
            return next(each[key] for key in ("i", "f", "s") if key in each)
    return None


def element(value: Fields) -> Fields:
    """Return the part of an input or output that says its type, under "elem_type"."""
    found: Fields = value["type"]["tensor_type"]
    return found


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
