"""A graph that is being rewritten: its messages as `graph_file` reads them, and back to bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_memllm_runtimes.graph_file import (
    BRANCH,
    DATA_TYPES,
    FIELD_BYTES,
    FIXED32,
    FLOAT,
    INT,
    REWRITTEN,
    SPAN,
    TEXT,
    VARINT,
    read_messages,
)

Fields = dict[str, Any]

CONTRIB = "com.microsoft"
CODES = {name: code for code, name in DATA_TYPES.items()}
_FLOAT, _INTEGER, _INTEGERS = 1, 2, 7  # types of attributes


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

    def constant(self, name: str, numbers: int | float | list[int]) -> str:
        """Add a weight of a number or of integers, and return its name.

        Integers become int64, [len(numbers)] or without sizes, a float float32.
        """
        kind = "float32" if isinstance(numbers, float) else "int64"
        values = np.array(numbers, kind)
        fields = {"dims": list(values.shape), "data_type": CODES[kind], "name": name}
        self.tensors[name] = {**fields, "raw_data": values.tobytes()}
        return name

    def drop_unused_constants(self) -> None:
        """Drop the numbers in the graph that no node reads any more; no node has branches yet."""
        used = {name for each in self.nodes for name in each["input"]}
        for name in [name for name, each in self.tensors.items() if "raw_data" in each]:
            if name not in used:
                del self.tensors[name]

    def import_domain(self, domain: str, version: int) -> None:
        """Let nodes be operators of another domain."""
        self._model["opset_import"].append({"domain": domain, "version": version})

    def require_opset(self, version: int) -> None:
        """Let ONNX's own operators be those of an operator set, or of the later one they are of."""
        for each in self._model["opset_import"]:
            if not each.get("domain"):
                each["version"] = max(version, each["version"])


def node(
    op_type: str,
    inputs: list[str],
    *outputs: str,
    domain: str = "",
    **attributes: int | float | list[int],
) -> Fields:
    """Return a node, named after its first output."""
    fields: Fields = {"input": inputs, "output": list(outputs), "name": outputs[0]}
    fields |= {"op_type": op_type, "domain": domain}
    if attributes:
        fields["attribute"] = written(attributes)
    return fields


def written(attributes: Mapping[str, int | float | list[int]]) -> list[Fields]:
    """Return the attributes of a node as its message has them."""
    return [_attribute(name, value) for name, value in attributes.items()]


def _attribute(name: str, value: int | float | list[int]) -> Fields:
    if isinstance(value, list):
        return {"name": name, "ints": value, "type": _INTEGERS}
    if isinstance(value, float):
        return {"name": name, "f": value, "type": _FLOAT}
    return {"name": name, "i": value, "type": _INTEGER}


@dataclass(frozen=True, slots=True)
class Branch:
    """Nodes that may read everything outside, and their results: names and element types."""

    nodes: list[Fields]
    results: list[tuple[str, int]]

    def fields(self, name: str) -> Fields:
        """Return it as a graph of that name."""
        outputs = [
            {"name": each, "type": {"tensor_type": {"elem_type": kind}}}
            for each, kind in self.results
        ]
        return {"node": self.nodes, "name": name, "output": outputs}


def either(condition: str, then: Branch, otherwise: Branch, outputs: list[str]) -> Fields:
    """Return a node that runs one branch or the other and calls its results by ``outputs``."""
    fields = node("If", [condition], *outputs)
    fields["attribute"] = [
        {"name": name, "g": branch.fields(f"{outputs[0]}/{name}"), "type": BRANCH}
        for name, branch in (("then_branch", then), ("else_branch", otherwise))
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
    """Return a message of a kind in `REWRITTEN` as protobuf spells it.

    A span is a pair of places in ``data``, or bytes.
    """
    parts: list[bytes] = []
    for number, (name, each, repeated) in REWRITTEN[kind].items():
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
