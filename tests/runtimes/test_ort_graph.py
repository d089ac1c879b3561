"""Graphs that do not fit their artifact: each is refused, in words that say what is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm_runtimes import ort_graph
from support.checkpoints import MakeArtifact
from support.graphs import change_graph, manifest_of, refused, seal

onnx = pytest.importorskip("onnx")

OTHER = "sha256:" + "ab" * 32


@pytest.fixture
def folder(make_artifact: MakeArtifact, tmp_path: Path) -> Path:
    source = make_artifact(graph_weights="fp32", table_codec="f32")
    return Path(shutil.copytree(source, tmp_path / "artifact"))


def test_a_graph_of_another_model_is_refused(folder: Path) -> None:
    identity = manifest_of(folder).model.identity.removeprefix("sha256:")[:12]

    def change(model: Any) -> None:
        for entry in model.metadata_props:
            if entry.key == "edge_memllm.identity":
                entry.value = OTHER

    change_graph(folder, change)
    refused(
        folder,
        rf"graph\.onnx: graph and manifest are of different models, abababababab and {identity}",
    )


def test_a_graph_without_an_identity_is_refused(folder: Path) -> None:
    change_graph(folder, lambda model: model.ClearField("metadata_props"))
    refused(folder, "graph and manifest are of different models, none and")


def point_outside(model: Any, location: str) -> None:
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "table.safetensors"])
def test_weights_from_a_file_the_manifest_does_not_name_are_refused(
    folder: Path, location: str
) -> None:
    change_graph(folder, lambda model: point_outside(model, location))
    refused(folder, rf"takes weights from '{location}', expected none from outside")


def test_weights_from_the_file_the_manifest_names_are_taken(folder: Path) -> None:
    with edge_memllm.load(folder, device="cpu", threads=1) as model:
        expected = model.generate("one", max_new_tokens=8, ignore_eos=True)
    manifest = manifest_of(folder)
    path = folder / manifest.graph.file
    model_proto = onnx.load(path)
    weights = max(model_proto.graph.initializer, key=lambda each: len(each.raw_data)).raw_data
    (folder / "graph.onnx.data").write_bytes(weights)
    point_outside(model_proto, "graph.onnx.data")
    path.write_bytes(model_proto.SerializeToString())
    graph = dataclasses.replace(manifest.graph, external_data="graph.onnx.data")
    seal(folder, manifest, "graph.onnx.data", graph=graph)
    with edge_memllm.load(folder, device="cpu", threads=1) as model:
        assert model.generate("one", max_new_tokens=8, ignore_eos=True) == expected

    point_outside(model_proto, "elsewhere")
    path.write_bytes(model_proto.SerializeToString())
    seal(folder, manifest, "graph.onnx.data", graph=graph)
    refused(folder, r"takes weights from 'elsewhere', expected graph\.onnx\.data")


def test_an_input_too_many_is_refused(folder: Path) -> None:
    extra = onnx.helper.make_tensor_value_info("temperature", onnx.TensorProto.FLOAT, [1])
    change_graph(folder, lambda model: model.graph.input.append(extra))
    refused(folder, r"graph\.onnx: the graph's inputs differ: unexpected temperature\. Graph and")


def test_a_missing_output_is_refused(folder: Path) -> None:
    change_graph(folder, lambda model: model.graph.output.pop())
    refused(folder, r"the graph's outputs differ: missing present\.1\.value\.")


def test_other_heads_than_the_manifest_says_are_refused(folder: Path) -> None:
    manifest = manifest_of(folder)
    first, *others = manifest.model.caches
    caches = (dataclasses.replace(first, kv_heads=2), *others)
    model = dataclasses.replace(manifest.model, caches=caches)
    seal(folder, manifest, model=model)
    refused(
        folder,
        r"input past_key_values\.0\.key is float32 \['B', 4, 'C', 16\], the manifest says float32 "
        r"\['B', 2, 'C', 16\]\. Graph and table are from different exports",
    )


@pytest.mark.parametrize("content", [b"", b"\x08", b"not a graph at all", b"\x00" * 64])
def test_a_file_that_is_no_graph_is_refused(folder: Path, content: bytes) -> None:
    manifest = manifest_of(folder)
    (folder / "graph.onnx").write_bytes(content)
    seal(folder, manifest)
    refused(folder, r"graph\.onnx: (not an ONNX graph|graph and manifest are of different)")


def test_a_graph_the_library_cannot_load_is_refused_in_silence(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(model: Any) -> None:
        model.graph.node[0].op_type = "NoSuchOperator"

    change_graph(folder, change)
    refused(folder, "it has the operator 'NoSuchOperator', which no graph of ours has")
    monkeypatch.setattr(ort_graph, "check_graph", lambda *_: None)
    refused(folder, r"graph\.onnx: ONNX Runtime .* cannot load this graph: .*NoSuchOperator")
    assert capfd.readouterr() == ("", "")


def test_a_cut_graph_is_refused(folder: Path) -> None:
    manifest = manifest_of(folder)
    path = folder / "graph.onnx"
    whole = path.read_bytes()
    for end in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        seal(folder, manifest)
        refused(folder, r"graph\.onnx: (not an ONNX graph|graph and manifest|ONNX Runtime)")
