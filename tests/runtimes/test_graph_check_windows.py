"""Readers of a window: what they attend to is cut as the exporter cuts it, or the graph is refused.

The operator believes the lengths it is given, so they must count the rows of what was cut.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm_runtimes.ort_graph import read_checked_graph
from support.gates import export_gates, write_gates
from support.graphs import Change, change_graph, refused

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    return export_gates(write_gates(folder / "model"), folder / "out")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


def node(model: Any, name: str) -> Any:
    """The node of the cut whose name ends so."""
    (found,) = [n for n in model.graph.node if "/window/" in n.name and n.name.endswith(name)]
    return found


def reader(model: Any) -> Any:
    """The first layer that attends to the cut."""
    rows = node(model, "key/Slice").output[0]
    return next(n for n in model.graph.node if rows in n.input and "Group" in n.op_type)


def feeds(name: str, place: int, value: str) -> Change:
    return lambda model: node(model, name).input.__setitem__(place, value)


def reads(place: int, value: Any) -> Change:
    def change(model: Any) -> None:
        found = value if isinstance(value, str) else value(model).output[0]
        reader(model).input[place] = found

    return change


def number(part: str, value: int) -> Change:
    def change(model: Any) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name.endswith(f"window.{part}")]
        tensor.CopyFrom(numpy_helper.from_array(np.array([value]), tensor.name))

    return change


def attribute(name: str, key: str, value: int) -> Change:
    def change(model: Any) -> None:
        found = node(model, name)
        kept = [each for each in found.attribute if each.name != key]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(key, value)])

    return change


def test_all_readers_share_one_cut(folder: Path) -> None:
    model = onnx.load(folder / "graph.onnx")
    cut = node(model, "key/Slice").output[0]
    read = [n for n in model.graph.node if cut in n.input]
    assert len(read) > 1
    assert {n.input[4] for n in read} == {node(model, "value/Slice").output[0]}
    with Artifact.open(folder) as artifact:
        read_checked_graph(artifact)


def test_codes_are_not_cut(exported: Path, tmp_path: Path) -> None:
    source = exported.parent / "model"
    path = export_gates(source, tmp_path / "codes", graph_weights="int8", kv_dtype="int8")
    assert not [n for n in onnx.load(path / "graph.onnx").graph.node if "/window/" in n.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (number("before", 1), r"a start of max\(sub\(sub\(min\(seqlens_k\), K\), 1\), 0\)"),
        (number("none", 3), r"a start of .*, 3\), expected"),
        (number("zero", 1), r"has axes \[1\]|an axis of"),
        (number("axis", 1), "has an axis of"),
        (feeds("key/Slice", 1, "token_index"), "has a few integers|has a value"),
        (feeds("key/Slice", 2, "token_index"), "has an end of"),
        (feeds("key/Slice", 0, "past_key_values.0.key"), r"keys or values of .*'R'"),
        (feeds("cosine/Slice", 0, "model.norm.weight"), "angles of"),
        (feeds("first/ReduceMin", 0, "total_sequence_length"), "has integers total_sequence"),
        (feeds("first/Shape", 0, "token_index"), "has values of"),
        (feeds("first/Sub", 1, "seqlens_k"), "integers of type|one integer"),
        (feeds("seqlens_k/Sub", 0, "total_sequence_length"), "has lengths of"),
        (feeds("total/Sub", 0, "seqlens_k"), "has lengths of"),
        (attribute("first/Shape", "end", 1), "has end 1"),
        (attribute("first/ReduceMin", "keepdims", 0), "has keepdims 0"),
        (attribute("before/Cast", "to", 7), "integers of type|lengths of"),
        (attribute("before/Cast", "to", 1), "has to 1, expected"),
        (reads(5, "seqlens_k"), "has lengths of"),
        (reads(6, "total_sequence_length"), "has lengths of"),
        (reads(4, "present.0.value"), "has values of"),
        (reads(7, "sliding_attention.cos_cache"), "has a value|has a weight"),
        (reads(7, lambda model: node(model, "value/Slice")), "has angles of"),
    ],
)
def test_another_cut_is_refused(
    folder: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_graph(folder, change)
    monkeypatch.setattr("edge_memllm_runtimes.ort.open_session", None)
    refused(folder, rf"graph\.onnx: .*({message})")


def test_whole_keys_are_not_attended_to_with_the_lengths_of_a_cut(folder: Path) -> None:
    def change(model: Any) -> None:
        found = reader(model)
        for place, part in ((3, "key"), (4, "value")):
            found.input[place] = node(model, f"{part}/Slice").input[0]

    change_graph(folder, change)
    refused(folder, r"graph\.onnx: .*(has lengths of|angles)")
