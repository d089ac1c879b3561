"""A graph file as plain data, read before any library loads it, and more strictly than any would.

A graph may name other files to take weights from, hold graphs in graphs, or be written so that two
readers see two different things. So this reads the protobuf encoding of ONNX by itself
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) and takes one spelling only: known fields
of the known kind, nothing twice that there is once, numbers in their shortest form. What it refuses
may be ONNX, but our exporter does not write it. Weights stay where they are; no onnx package is
needed. What a graph means is the business of `graph_check`.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_memllm.errors import ArtifactError

# Kinds of fields. A tuple is one of them, repeated.
INT, FLOAT, TEXT, SPAN = "int", "float", "text", "span"
# message -> field number -> name and kind: a scalar, or another message.
Messages = dict[str, dict[int, tuple[str, str, bool]]]
MESSAGES: Messages = {
    "model": {
        1: ("ir_version", INT, False),
        2: ("producer_name", TEXT, False),
        3: ("producer_version", TEXT, False),
        4: ("domain", TEXT, False),
        5: ("model_version", INT, False),
        6: ("doc_string", TEXT, False),
        7: ("graph", "graph", False),
        8: ("opset_import", "opset", True),
        14: ("metadata_props", "entry", True),
    },
    "opset": {1: ("domain", TEXT, False), 2: ("version", INT, False)},
    "entry": {1: ("key", TEXT, False), 2: ("value", TEXT, False)},
    "graph": {
        1: ("node", "node", True),
        2: ("name", TEXT, False),
        5: ("initializer", "tensor", True),
        10: ("doc_string", TEXT, False),
        11: ("input", "value", True),
        12: ("output", "value", True),
        13: ("value_info", "value", True),
        16: ("metadata_props", "entry", True),
    },
    "node": {
        1: ("input", TEXT, True),
        2: ("output", TEXT, True),
        3: ("name", TEXT, False),
        4: ("op_type", TEXT, False),
        5: ("attribute", "attribute", True),
        6: ("doc_string", TEXT, False),
        7: ("domain", TEXT, False),
        9: ("metadata_props", "entry", True),
    },
    "attribute": {
        1: ("name", TEXT, False),
        2: ("f", FLOAT, False),
        3: ("i", INT, False),
        4: ("s", TEXT, False),
        7: ("floats", FLOAT, True),
        8: ("ints", INT, True),
        9: ("strings", TEXT, True),
        13: ("doc_string", TEXT, False),
        20: ("type", INT, False),
    },
    "tensor": {
        1: ("dims", INT, True),
        2: ("data_type", INT, False),
        8: ("name", TEXT, False),
        9: ("raw_data", SPAN, False),
        12: ("doc_string", TEXT, False),
        13: ("external_data", "entry", True),
        14: ("data_location", INT, False),
        16: ("metadata_props", "entry", True),
    },
    "value": {
        1: ("name", TEXT, False),
        2: ("type", "type", False),
        3: ("doc_string", TEXT, False),
        4: ("metadata_props", "entry", True),
    },
    "type": {1: ("tensor_type", "tensor type", False), 6: ("denotation", TEXT, False)},
    "tensor type": {1: ("elem_type", INT, False), 2: ("shape", "shape", False)},
    "shape": {1: ("dim", "dimension", True)},
    "dimension": {
        1: ("dim_value", INT, False),
        2: ("dim_param", TEXT, False),
        3: ("denotation", TEXT, False),
    },
}
# What a graph may have besides once it is rewritten for a processor: nodes with branches, which
# hold nodes without. No graph of an artifact has them.
REWRITTEN = MESSAGES | {
    "attribute": MESSAGES["attribute"] | {6: ("g", "branch", False)},
    "branch": {
        1: ("node", "node of a branch", True),
        2: ("name", TEXT, False),
        5: ("initializer", "tensor", True),
        10: ("doc_string", TEXT, False),
        12: ("output", "value", True),
        13: ("value_info", "value", True),
    },
    "node of a branch": MESSAGES["node"] | {5: ("attribute", "attribute of a branch", True)},
    "attribute of a branch": MESSAGES["attribute"],
}
BRANCH = 5  # type of an attribute
# What there is elsewhere in ONNX and never in ours, for a sentence that says more than a number.
_FOREIGN = {
    ("model", 20): "training information",
    ("model", 25): "functions",
    ("model", 26): "device configurations",
    ("graph", 15): "sparse initializers",
    ("node", 8): "an overloaded operator",
    ("attribute", 5): "a tensor in an attribute",
    ("attribute", 6): "a graph in an attribute (a branch or the body of a loop)",
    ("attribute", 10): "tensors in an attribute",
    ("attribute", 11): "graphs in an attribute",
    ("attribute", 21): "a reference to an attribute",
    ("attribute", 22): "a sparse tensor in an attribute",
    ("attribute", 23): "sparse tensors in an attribute",
    ("tensor", 3): "a segment of a tensor",
    **{("tensor", number): "weights that are not raw bytes" for number in (4, 5, 6, 7, 10, 11)},
}
VARINT, FIXED64, FIELD_BYTES, FIXED32 = 0, 1, 2, 5
_KINDS = (VARINT, FIXED64, FIELD_BYTES, FIXED32)
_WIRE = {INT: VARINT, FLOAT: FIXED32}
_LONGEST_VARINT = 10
_MAX_TEXT = 4096
# A graph of a hundred layers has some hundred thousand; each takes memory while it is read.
_MAX_FIELDS = 1 << 20

DATA_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 10: 2}
_EXTERNAL = 1
_PLACE = re.compile(r"0|[1-9][0-9]{0,17}")
# ONNX Runtime's own: "prepacked_0" -> "kernel+hash|offset;length;checksum|offset;..."
_PACKED = "prepacked"
_BLOB = re.compile(r"\d{1,18};\d{1,18};[0-9A-Za-z]*")

Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight: where its bytes lie, in the graph file or in the one beside it."""

    name: str
    data_type: int  # of ONNX
    dims: tuple[int, ...]
    outside: str | None  # the file beside it
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Node:
    """One operator."""

    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output: its element type, and its sizes or the words for them."""

    name: str
    data_type: int
    dims: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """Everything a graph file says, weights left out."""

    metadata: dict[str, str]
    opsets: dict[str, int]
    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    packed_offsets: frozenset[int]  # of repacked weights in the file beside it
    repacked: frozenset[str]  # the weights that those are copies of

    @property
    def external_files(self) -> set[str]:
        """The names of the files that weights are taken from."""
        return {each.outside for each in self.tensors.values() if each.outside is not None}


def read_graph(data: bytes, *, rewritten: bool = False) -> GraphFile:
    """Read the bytes of an ONNX file; of branches, which only ``rewritten`` ones have, nothing.

    Raises `ArtifactError` when it is not one, and when it holds what our exporter does not write.
    """
    model = read_messages(data, REWRITTEN if rewritten else MESSAGES)
    graph = model.get("graph", {})
    packed: dict[str, list[int]] = {}
    tensors = [_tensor(each, packed) for each in graph.get("initializer", ())]
    opsets = model.get("opset_import", ())
    return GraphFile(
        metadata=_entries(model.get("metadata_props", ()), "metadata"),
        opsets=_unique(
            [(each.get("domain", ""), each.get("version", 0)) for each in opsets], "operator set"
        ),
        nodes=tuple(_node(each) for each in graph.get("node", ())),
        tensors=_unique([(each.name, each) for each in tensors], "initializer"),
        inputs=tuple(_value(each) for each in graph.get("input", ())),
        outputs=tuple(_value(each) for each in graph.get("output", ())),
        packed_offsets=frozenset(itertools.chain.from_iterable(packed.values())),
        repacked=frozenset(packed),
    )


def read_messages(data: bytes, messages: Messages = MESSAGES) -> dict[str, Any]:
    """Return the fields of a file's outermost message; spans of bytes are pairs of places.

    Raises as `read_graph` does.
    """
    return _Reader(data, messages).message("model", 0, len(data))


class _Reader:
    """Reads messages into dicts of their fields' names; a span of bytes stays a pair of places."""

    def __init__(self, data: bytes, messages: Messages) -> None:
        self._data = data
        self._messages = messages
        self._fields = 0

    def message(self, kind: str, place: int, end: int) -> dict[str, Any]:
        known = self._messages[kind]
        found: dict[str, Any] = {}
        while place < end:
            self._count()
            tag, place = self._varint(place, end)
            number, wire = tag >> 3, tag & 7
            if wire not in _KINDS:
                raise _malformed(f"it has a field of kind {wire}")
            if not number:
                raise _malformed("it has a field of number 0")
            if number not in known:
                raise _foreign(_FOREIGN.get((kind, number), f"field {number} of a {kind}"))
            name, each, repeated = known[number]
            if wire == FIELD_BYTES:
                length, place = self._varint(place, end)
                if length > end - place:
                    raise _malformed("a field is longer than what holds it")
                values = self._delimited(each, repeated, place, place + length)
                place += length
            else:
                value, place = self._scalar(each, wire, place, end)
                values = [value]
            if repeated:
                found.setdefault(name, []).extend(values)
            elif name in found:
                raise _malformed(f"{name} of a {kind} is there twice")
            else:
                (found[name],) = values
        return found

    def _delimited(self, kind: str, repeated: bool, place: int, end: int) -> list[Any]:
        if kind == SPAN:
            return [(place, end)]
        if kind == TEXT:
            return [self._text(place, end)]
        if kind not in (INT, FLOAT):
            return [self.message(kind, place, end)]
        if not repeated:
            raise _malformed("a number is written as bytes")
        values = []
        while place < end:
            self._count()
            value, place = self._scalar(kind, _WIRE[kind], place, end)
            values.append(value)
        return values

    def _scalar(self, kind: str, wire: int, place: int, end: int) -> tuple[int | float, int]:
        """Return a number, and the place behind it."""
        if _WIRE.get(kind) != wire:
            raise _malformed(f"it has a field of kind {wire} where none is expected")
        if kind == INT:
            value, place = self._varint(place, end)
            return value - (1 << 64) if value >> 63 else value, place
        if place + 4 > end:
            raise _malformed("it ends inside a field")
        number: float = struct.unpack_from("<f", self._data, place)[0]
        if not math.isfinite(number):
            raise _malformed("a number is not finite")
        return number, place + 4

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """Return a number of at most 64 bits, written as short as it can be, and what is behind."""
        value = 0
        for shift in range(0, 7 * _LONGEST_VARINT, 7):
            if place >= end:
                raise _malformed("it ends inside a field")
            byte = self._data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64 or (shift and not byte):
                    raise _malformed("a number is written longer than it is")
                return value, place
        raise _malformed("a number is too long")

    def _text(self, place: int, end: int) -> str:
        if end - place > _MAX_TEXT:
            raise _malformed(f"a text has {end - place} bytes")
        try:
            return self._data[place:end].decode("utf-8")
        except UnicodeDecodeError:
            raise _malformed("a text is not UTF-8") from None

    def _count(self) -> None:
        self._fields += 1
        if self._fields > _MAX_FIELDS:
            raise _malformed(f"it has more than {_MAX_FIELDS} parts")


def _tensor(fields: dict[str, Any], packed: dict[str, list[int]]) -> Tensor:
    name, dims = fields.get("name", ""), tuple(fields.get("dims", ()))
    data_type = fields.get("data_type", 0)
    if data_type not in ITEM_BYTES:
        raise _malformed(f"{name!a:.80} has elements of type {data_type}")
    if any(size < 0 for size in dims):
        raise _malformed(f"{name!a:.80} has a negative size")
    outside = _entries(fields.get("external_data", ()), "external data")
    if fields.get("data_location", 0) != (_EXTERNAL if outside else 0) or (
        ("raw_data" in fields) == bool(outside)
    ):
        raise _malformed(f"{name!a:.80} has its bytes in two places or in none")
    if outside:
        where, start, size = _place(name, outside)
        if offsets := _packed_offsets(outside):
            packed[name] = offsets
    else:
        where, (start, end) = None, fields["raw_data"]
        size = end - start
    expected = math.prod(dims) * ITEM_BYTES[data_type]
    if size != expected:
        raise _malformed(f"{name!a:.80} has {size} bytes, its shape {list(dims)} needs {expected}")
    return Tensor(name, data_type, dims, where, start, size)


def _place(name: str, outside: dict[str, str]) -> tuple[str, int, int]:
    """Return file, offset and length that a tensor's external data names."""
    keys = {key for key in outside if not key.startswith(_PACKED)}
    if keys != {"location", "offset", "length"}:
        raise _malformed(
            f"{name!a:.80} says where its bytes are by {', '.join(sorted(keys))!a:.80}"
        )
    offset, length = outside["offset"], outside["length"]
    if not (_PLACE.fullmatch(offset) and _PLACE.fullmatch(length)):
        raise _malformed(f"{name!a:.80} has {length!a:.20} bytes at {offset!a:.20}")
    return outside["location"], int(offset), int(length)


def _packed_offsets(outside: dict[str, str]) -> list[int]:
    offsets = []
    for key, text in outside.items():
        if key.startswith(_PACKED):
            blobs = text.split("|")[1:]
            if not all(_BLOB.fullmatch(blob) for blob in blobs):
                raise _malformed(f"repacked weights at {text!a:.80}")
            offsets += [int(blob.split(";")[0]) for blob in blobs]
    return offsets


# Types of attributes as ONNX numbers them -> the field that holds the value, and how to take it.
_ATTRIBUTES: dict[int, tuple[str, Callable[[Any], Attribute]]] = {
    1: ("f", float),
    2: ("i", int),
    3: ("s", str),
    6: ("floats", tuple),
    7: ("ints", tuple),
    8: ("strings", tuple),
}


def _node(fields: dict[str, Any]) -> Node:
    attributes = []
    for each in fields.get("attribute", ()):
        name, kind = each.get("name", ""), each.get("type", 0)
        if kind == BRANCH and "g" in each:
            continue
        values = each.keys() & {"f", "i", "s", "floats", "ints", "strings"}
        if kind not in _ATTRIBUTES or not values <= {_ATTRIBUTES[kind][0]}:
            raise _malformed(f"attribute {name!a:.80} is of type {kind} and holds something else")
        field, take = _ATTRIBUTES[kind]
        if field not in each and field in ("f", "i", "s"):
            raise _malformed(f"attribute {name!a:.80} has no value")
        attributes.append((name, take(each.get(field, ()))))
    return Node(
        op_type=fields.get("op_type", ""),
        domain=fields.get("domain", ""),
        inputs=tuple(fields.get("input", ())),
        outputs=tuple(fields.get("output", ())),
        attributes=_unique(attributes, "attribute"),
    )


def _value(fields: dict[str, Any]) -> Value:
    tensor = fields.get("type", {}).get("tensor_type", {})
    dims = []
    for each in tensor.get("shape", {}).get("dim", ()):
        if "dim_value" in each and "dim_param" in each:
            raise _malformed("a size is a number and a word")
        dims.append(each["dim_value"] if "dim_value" in each else each.get("dim_param", ""))
    return Value(fields.get("name", ""), tensor.get("elem_type", 0), tuple(dims))


def _entries(entries: Any, what: str) -> dict[str, str]:
    return _unique([(each.get("key", ""), each.get("value", "")) for each in entries], what)


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    """Return the pairs as a dict; a library that takes the last of two would see another one."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _malformed(f"{what} {name!a:.80} is there twice")
        found[name] = value
    return found


def _foreign(what: str) -> ArtifactError:
    return ArtifactError(
        f"not a graph of this format: it has {what}, which no graph of ours has. Do not use this "
        "artifact."
    )


def _malformed(reason: str) -> ArtifactError:
    return ArtifactError(f"not an ONNX graph: {reason}. Copy the artifact again.")
