from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.errors import ArtifactError
from edge_memllm_runtimes.graph_file import GraphReferences, read_references

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402


def references(data: bytes) -> GraphReferences:
    return read_references(io.BytesIO(data), len(data))


def external(name: str, location: str) -> Any:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def plain(name: str) -> Any:
    return helper.make_tensor(name, TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])


def model_of(graph: Any, **options: Any) -> bytes:
    model = helper.make_model(graph, **options)
    model.metadata_props.add(key="edge_memllm.identity", value="sha256:é")
    model.metadata_props.add(key="empty", value="")
    return model.SerializeToString()


def constant(name: str, tensor: Any) -> Any:
    return helper.make_node("Constant", [], [name], value=tensor)


def graph_of(*nodes: Any, initializers: Any = (), sparse: Any = ()) -> Any:
    graph = helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers))
    graph.sparse_initializer.extend(sparse)
    return graph


def test_metadata_is_read_and_a_self_contained_graph_names_no_file() -> None:
    found = references(model_of(graph_of(constant("c", plain("p")), initializers=[plain("w")])))
    assert found.metadata == {"edge_memllm.identity": "sha256:é", "empty": ""}
    assert found.external_files == set()


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "sparse", "function"])
def test_an_outside_file_is_found_wherever_it_is_named(place: str) -> None:
    tensor = external("t", "../secret")
    options: dict[str, Any] = {}
    graph = graph_of(constant("c", plain("p")))
    match place:
        case "initializer":
            graph = graph_of(initializers=[plain("w"), tensor, plain("v")])
        case "attribute":
            graph = graph_of(constant("c", tensor))
        case "subgraph":
            inner = graph_of(initializers=[tensor])
            empty = graph_of()
            graph = graph_of(
                helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=empty)
            )
        case "sparse":
            sparse = onnx.SparseTensorProto(values=plain("v"), indices=tensor, dims=[3])
            graph = graph_of(sparse=[sparse])
        case "function":
            opsets = [helper.make_opsetid("", 23)]
            function = helper.make_function("d", "f", [], ["c"], [constant("c", tensor)], opsets)
            options["functions"] = [function]
    assert references(model_of(graph, **options)).external_files == {"../secret"}


def test_weights_are_skipped_not_read() -> None:
    big = helper.make_tensor("w", TensorProto.UINT8, [1 << 20], bytes(1 << 20), raw=True)
    data = model_of(graph_of(initializers=[big]))

    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            part = super().read(size)
            Counting.taken += len(part)
            return part

    read_references(Counting(data), len(data))
    assert Counting.taken < 1000


def test_every_cut_is_an_error_or_a_shorter_model() -> None:
    data = model_of(graph_of(constant("c", plain("p")), initializers=[external("t", "out")]))
    whole = references(data)
    errors = 0
    for end in range(len(data)):
        try:
            found = references(data[:end])
        except ArtifactError:
            errors += 1
        else:
            assert found.metadata.keys() <= whole.metadata.keys()
    assert errors > len(data) // 2


@given(st.binary(max_size=200))
def test_any_bytes_give_references_or_one_kind_of_error(data: bytes) -> None:
    try:
        references(data)
    except ArtifactError as error:
        assert "not an ONNX graph" in str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x3a\x7f", "a field is longer than what holds it"),
        (b"\x3a", "it ends inside a number"),
        (b"\xff" * 12, "a number is too long"),
        (b"\x0b", "it has a field of kind 3"),
        (b"\x0d\x00", "it ends inside a field"),
        (b"\x72\x84\x40\x12\x81\x40" + b"x" * 8193, "a metadata text has 8193 bytes"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"not an ONNX graph: {message}. Copy the artifact"):
        references(data)


def part(number: int, payload: bytes) -> bytes:
    """One length-delimited field."""
    size, length = len(payload), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + payload


def test_deep_nesting_is_refused() -> None:
    graph = b""
    for _ in range(40):
        graph = part(1, part(5, part(6, graph)))  # node, its attribute, a graph in it
    with pytest.raises(ArtifactError, match="it is nested too deeply"):
        references(part(7, graph))


def packed(value: str) -> bytes:
    tensor = external("t", "beside")
    tensor.external_data.add(key="prepacked_0", value=value)
    return model_of(graph_of(initializers=[tensor]))


def test_places_of_repacked_weights_are_read() -> None:
    assert references(packed("MatMulNBits+17|4096;9342;0|70;3;0")).packed_offsets == {4096, 70}
    assert references(packed("MatMulNBits+17")).packed_offsets == set()


@pytest.mark.parametrize("value", ["k|", "k|4096", "k|-1;2;0", "k|1;2;0|x", "k|1;2;3;4"])
def test_repacked_weights_in_no_place_are_refused(value: str) -> None:
    with pytest.raises(ArtifactError, match="not an ONNX graph: repacked weights at 'k"):
        references(packed(value))
