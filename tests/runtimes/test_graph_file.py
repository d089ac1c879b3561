"""Reading graph files: one spelling is taken, and no other reader sees more than ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.errors import ArtifactError
from edge_memllm_runtimes import graph_file
from edge_memllm_runtimes.graph_file import GraphFile, read_graph
from support.checkpoints import MakeArtifact

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402


def read(data: bytes) -> GraphFile:
    return read_graph(data)


def refused(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(data)


def external(name: str, location: str = "beside") -> Any:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "8"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def plain(name: str) -> Any:
    return helper.make_tensor(name, TensorProto.FLOAT, [3], bytes(12), raw=True)


def model_of(graph: Any, **options: Any) -> bytes:
    model = helper.make_model(graph, **options)
    model.metadata_props.add(key="edge_memllm.identity", value="sha256:é")
    model.metadata_props.add(key="empty", value="")
    data: bytes = model.SerializeToString()
    return data


def graph_of(*nodes: Any, initializers: Any = (), sparse: Any = ()) -> Any:
    graph = helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers))
    graph.sparse_initializer.extend(sparse)
    return graph


def test_what_a_graph_says_is_read() -> None:
    node = helper.make_node(
        "Split", ["a", "", "w"], ["b", ""], domain="d", axis=-1, scale=0.5, sizes=[1, 2], kind="k"
    )
    value = helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["B", 3])
    graph = helper.make_graph([node], "g", [value], [], [plain("w"), external("t")])
    found = read(model_of(graph, opset_imports=[helper.make_opsetid("", 23)]))
    assert found.metadata == {"edge_memllm.identity": "sha256:é", "empty": ""}
    assert found.opsets == {"": 23}
    (read_node,) = found.nodes
    assert (read_node.op_type, read_node.domain) == ("Split", "d")
    assert (read_node.inputs, read_node.outputs) == (("a", "", "w"), ("b", ""))
    assert read_node.attributes == {"axis": -1, "scale": 0.5, "sizes": (1, 2), "kind": "k"}
    assert found.inputs == (graph_file.Value("a", TensorProto.FLOAT16, ("B", 3)),)
    assert found.tensors["t"] == graph_file.Tensor("t", TensorProto.FLOAT, (1,), "beside", 8, 4)
    inside = found.tensors["w"]
    assert (inside.dims, inside.outside, inside.size) == ((3,), None, 12)
    assert found.external_files == {"beside"}


def attribute(tensor: Any) -> Any:
    return graph_of(helper.make_node("Constant", [], ["c"], value=tensor))


def branch(tensor: Any) -> Any:
    inner, empty = graph_of(initializers=[tensor]), graph_of()
    return graph_of(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=empty))


def sparse(tensor: Any) -> Any:
    return graph_of(sparse=[onnx.SparseTensorProto(values=plain("v"), indices=tensor, dims=[3])])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (attribute, "a tensor in an attribute"),
        (branch, r"a graph in an attribute \(a branch or the body of a loop\)"),
        (sparse, "sparse initializers"),
    ],
)
def test_weights_in_other_places_are_refused(make: Callable[[Any], Any], what: str) -> None:
    refused(model_of(make(external("t", "../secret"))), f"it has {what}, which no graph of ours")
    refused(model_of(make(plain("t"))), f"it has {what}, which no graph of ours")


def test_functions_and_training_are_refused() -> None:
    opsets = [helper.make_opsetid("", 23)]
    node = helper.make_node("Relu", ["a"], ["b"])
    function = helper.make_function("d", "f", ["a"], ["b"], [node], opsets)
    refused(model_of(graph_of(), functions=[function]), "it has functions, which no graph of ours")
    training = onnx.ModelProto()
    training.training_info.add().initialization.CopyFrom(graph_of(initializers=[external("t")]))
    refused(training.SerializeToString(), "it has training information, which no graph of ours")


def change_tensor(change: Callable[[Any], object]) -> bytes:
    tensor = external("t")
    change(tensor)
    return model_of(graph_of(initializers=[tensor]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.ClearField("data_location"), "has its bytes in two places or in none"),
        (lambda t: t.ClearField("external_data"), "has its bytes in two places or in none"),
        (lambda t: setattr(t, "raw_data", b"1234"), "has its bytes in two places or in none"),
        (lambda t: t.external_data.add(key="location", value="x"), "'location' is there twice"),
        (
            lambda t: t.external_data.add(key="basepath", value="/"),
            "by 'basepath, length, location",
        ),
        (lambda t: t.external_data.pop(), "says where its bytes are by"),
        (lambda t: setattr(t.external_data[1], "value", "-8"), "has '4' bytes at '-8'"),
        (lambda t: setattr(t.external_data[1], "value", "08"), "has '4' bytes at '08'"),
        (lambda t: setattr(t.external_data[1], "value", " 8"), "has '4' bytes at ' 8'"),
        (lambda t: setattr(t.external_data[2], "value", "0x4"), "has '0x4' bytes"),
        (lambda t: t.dims.append(2), r"'t' has 4 bytes, its shape \[1, 2\] needs 8"),
        (lambda t: t.dims.__setitem__(0, -1), "'t' has a negative size"),
        (lambda t: t.dims.extend([1 << 62, 1 << 62]), "its shape .* needs"),
        (lambda t: setattr(t, "data_type", TensorProto.STRING), "has elements of type 8"),
        (lambda t: t.float_data.append(1), "weights that are not raw bytes"),
        (lambda t: t.int64_data.append(1), "weights that are not raw bytes"),
        (lambda t: t.segment.CopyFrom(TensorProto.Segment(begin=1)), "a segment of a tensor"),
    ],
)
def test_a_weight_has_its_bytes_in_one_place(change: Callable[[Any], object], message: str) -> None:
    refused(change_tensor(change), message)


@pytest.mark.parametrize("what", ["initializer", "metadata", "operator set", "attribute"])
def test_nothing_is_named_twice(what: str) -> None:
    graph = graph_of(helper.make_node("Cast", ["a"], ["b"], to=1), initializers=[plain("w")])
    model = helper.make_model(graph)
    match what:
        case "initializer":
            model.graph.initializer.append(external("w"))
        case "metadata":
            for value in ("a", "b"):
                model.metadata_props.add(key="k", value=value)
        case "operator set":
            model.opset_import.append(helper.make_opsetid("", 7))
        case "attribute":
            model.graph.node[0].attribute.append(helper.make_attribute("to", 10))
    refused(model.SerializeToString(), f"{what} '[a-zA-Z]*' is there twice")


# --- spellings ----------------------------------------------------------------------------------


def varint(value: int, length: int = 0) -> bytes:
    """A number, in at least `length` bytes."""
    data = []
    while value > 0x7F or len(data) + 1 < length:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def part(number: int, payload: bytes, *, tag: int = 0, length: int = 0) -> bytes:
    """One length-delimited field, its two numbers perhaps longer than needed."""
    return varint(number << 3 | 2, tag) + varint(len(payload), length) + payload


def entry(key: str, value: str) -> bytes:
    return part(1, key.encode()) + part(2, value.encode())


BOTH = b"\x08\x01" + part(2, b"B")
HIDDEN = part(13, entry("location", "../secret"))


@pytest.mark.parametrize(
    "tag",
    [
        varint((1 << 32) + (13 << 3 | 2)),  # a reader that keeps 32 bits sees field 13
        varint((1 << 35) + (13 << 3 | 2)),
        varint((1 << 63) + (13 << 3 | 2)),
        varint(13 << 3 | 2, length=2),
        varint(13 << 3 | 2, length=10),
        varint((1 << 64) + (13 << 3 | 2)),
        bytes([13 << 3 | 2 | 0x80, *[0x80] * 8, 0x7E]),
    ],
    ids=lambda tag: tag.hex(),
)
def test_a_field_that_another_reader_would_see_is_refused(tag: bytes) -> None:
    """ONNX Runtime's protobuf cuts tags to 32 bits and would follow the location, out of here."""
    tensor = plain("t").SerializeToString() + tag + HIDDEN[1:]
    refused(part(7, part(5, tensor)), "which no graph of ours has|is written longer than it is")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x3a\x7f", "not an ONNX graph: a field is longer than what holds it"),
        (b"\x3a", "not an ONNX graph: it ends inside a field"),
        (b"\xff" * 12, "not an ONNX graph: a number is too long"),
        (b"\x0b", "not an ONNX graph: it has a field of kind 3"),
        (b"\x3c", "not an ONNX graph: it has a field of kind 4"),
        (b"\x0d\x00", "not an ONNX graph: it has a field of kind 5 where none is expected"),
        (b"\x38\x07", "not an ONNX graph: it has a field of kind 0 where none is expected"),
        (part(1, b"\x01"), "not an ONNX graph: a number is written as bytes"),
        (part(14, part(1, b"x" * 8193)), "not an ONNX graph: a text has 8193 bytes"),
        (part(14, part(1, b"\xff")), "not an ONNX graph: a text is not UTF-8"),
        (part(7, b"") * 2, "graph of a model is there twice"),
        (part(14, part(1, b"k") * 2), "key of a entry is there twice"),
        (part(7, b"", length=2), "a number is written longer than it is"),
        (varint(1 << 3, length=2) + b"\x01", "a number is written longer than it is"),
        (part(0, b""), "not an ONNX graph: it has a field of number 0"),
        (part(99, b""), "it has field 99 of a model, which no graph of ours has"),
        (part(7, part(11, part(2, part(4, b"")))), "field 4 of a type"),
        (part(7, part(5, b"\x10\x02\x4a\x00\x70\x02")), "has its bytes in two places or in none"),
        (part(7, part(5, part(2, b""))), "a number is written as bytes"),
        (part(7, part(1, part(5, b"\x15\x00\x00\x80\x7f"))), "a number is not finite"),
        (part(7, part(1, part(5, b"\xa0\x01\x01\x18\x01"))), "of type 1 and holds something else"),
        (part(7, part(1, part(5, b"\xa0\x01\x01"))), "has no value"),
        (part(7, part(1, part(5, b"\xa0\x01\x04"))), "of type 4 and holds something else"),
        (
            part(7, part(11, part(2, part(1, part(2, part(1, BOTH)))))),
            "a size is a number and a word",
        ),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    refused(data, message)


def test_a_size_may_be_unknown() -> None:
    """ONNX Runtime writes such values into the graphs that it saves."""
    data = part(7, part(11, part(2, part(1, b"\x08\x01" + part(2, part(1, b""))))))
    assert read(data).inputs == (graph_file.Value("", 1, ("",)),)


def test_numbers_may_be_packed() -> None:
    tensor = part(1, varint(2) + varint(3)) + b"\x10\x02" + part(8, b"w") + part(9, bytes(6))
    assert read(part(7, part(5, tensor))).tensors["w"].dims == (2, 3)


def test_parts_are_counted_before_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_file, "_MAX_FIELDS", 100)
    refused(part(7, part(1, b"") * 100), "it has more than 100 parts")
    refused(part(7, part(5, part(1, b"\x01" * 100))), "it has more than 100 parts")


# --- against ONNX's own reader ------------------------------------------------------------------


def all_tensors(message: Any) -> list[Any]:
    """Every tensor anywhere in a message, found by ONNX's own description of it."""
    found = []
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for each in value if field.is_repeated else [value]:
            found += [each] if field.message_type.name == "TensorProto" else []
            found += all_tensors(each)
    return found


def places(tensors: list[Any]) -> list[tuple[Any, ...]]:
    return sorted(
        (
            each.name,
            tuple(each.dims),
            each.data_type,
            next((e.value for e in each.external_data if e.key == "location"), None),
            None if each.external_data else each.raw_data,
        )
        for each in tensors
    )


def same_as_onnx(data: bytes) -> bool:
    """Whether our reader takes `data`; if it does, it must have seen what ONNX's own sees."""
    try:
        found = read(data)
    except ArtifactError:
        return False
    model = onnx.ModelProto()
    model.ParseFromString(data)
    ours = sorted(
        (
            each.name,
            each.dims,
            each.data_type,
            each.outside,
            data[each.start : each.start + each.size] if each.outside is None else None,
        )
        for each in found.tensors.values()
    )
    assert ours == places(all_tensors(model))
    assert [(n.op_type, n.domain, *n.inputs, *n.outputs) for n in found.nodes] == [
        (n.op_type, n.domain, *n.input, *n.output) for n in model.graph.node
    ]
    assert {name: found.metadata[name] for name in found.metadata} == {
        each.key: each.value for each in model.metadata_props
    }
    assert found.opsets == {each.domain: each.version for each in model.opset_import}
    assert not model.functions and not model.training_info and not model.graph.sparse_initializer
    for node in model.graph.node:
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert not any(isinstance(value, onnx.GraphProto) for value in values.values())
    return True


def test_every_cut_is_refused_or_read_alike() -> None:
    data = model_of(graph_of(initializers=[plain("p"), external("t")]))
    taken = [end for end in range(len(data) + 1) if same_as_onnx(data[:end])]
    assert len(data) in taken
    assert len(taken) < len(data) // 2


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read_alike(data: bytes) -> None:
    same_as_onnx(data)


@pytest.fixture(scope="module")
def real(make_artifact: MakeArtifact) -> bytes:
    """A graph of the exporter, its long weights beside it, so that most bytes are structure."""
    path: Path = make_artifact(graph_weights="int4", table_codec="int8", beta=2) / "graph.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > 64:
            size = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "beside"), ("offset", "0"), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
    data: bytes = model.SerializeToString()
    assert same_as_onnx(data)
    return data


@pytest.mark.parametrize("seed", range(4))
def test_mutated_graphs_are_refused_or_read_alike(real: bytes, seed: int) -> None:
    choose = random.Random(seed)
    taken = 0
    for _ in range(150):
        data = bytearray(real)
        for _ in range(choose.choice((1, 1, 1, 2, 4))):
            place = choose.randrange(len(data))
            match choose.randrange(5):
                case 0:
                    data[place] ^= 1 << choose.randrange(8)
                case 1:
                    data[place] = choose.randrange(256)
                case 2:
                    del data[place : place + choose.randrange(1, 9)]
                case 3:
                    other = choose.randrange(len(data))
                    data[place:place] = data[other : other + choose.randrange(1, 40)]
                case 4:
                    data[place:place] = varint(choose.getrandbits(choose.randrange(1, 70)))
        taken += same_as_onnx(bytes(data))
    assert taken > 0


# --- repacked weights ---------------------------------------------------------------------------


def packed(value: str) -> bytes:
    tensor = external("t", "beside")
    tensor.external_data.add(key="prepacked_0", value=value)
    return model_of(graph_of(initializers=[tensor]))


def test_places_of_repacked_weights_are_read() -> None:
    assert read(packed("MatMulNBits+17|4096;9342;0|70;3;0")).packed_offsets == {4096, 70}
    assert read(packed("MatMulNBits+17")).packed_offsets == set()


@pytest.mark.parametrize("value", ["k|", "k|4096", "k|-1;2;0", "k|1;2;0|x", "k|1;2;3;4"])
def test_repacked_weights_in_no_place_are_refused(value: str) -> None:
    refused(packed(value), "not an ONNX graph: repacked weights at 'k")
