"""Graphs as a CPU computes them: the same network, in float32 and with windows cut."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.table.table import Table
from edge_memllm_runtimes.cpu_graph import for_cpu
from edge_memllm_runtimes.cpu_graph.edited import write_message
from edge_memllm_runtimes.graph_file import read_graph, read_messages
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.ort_graph import read_checked_graph
from edge_memllm_runtimes.runtime import open_runtime
from support.checkpoints import MakeArtifact
from support.gates import export_gates, write_gates

onnx = pytest.importorskip("onnx")

IDS = np.random.default_rng(3).integers(0, 256, 60).tolist()
FORMS: list[dict[str, Any]] = [
    {"beta": 0, "graph_weights": "int8", "table_codec": "f16"},
    {"beta": 2, "graph_weights": "int8", "table_codec": "int8-g64", "num_key_value_heads": 2},
    {"beta": 3, "graph_weights": "int8", "table_codec": "int4-g32", "qk_norm": True},
    {"beta": 3, "graph_weights": "int8", "kv_dtype": "int8", "attention_bias": True},
    {"beta": 3, "graph_weights": "int8", "kv_dtype": "float32", "head_dim": 20},
    {"beta": 8, "graph_weights": "int8"},
]


def name_of(value: object) -> str:
    return str(value).translate(str.maketrans("", "", "{}' "))


def content_of(folder: Path) -> bytes:
    with Artifact.open(folder) as artifact:
        return read_checked_graph(artifact).content


def logits_of(folder: Path, chunk: int = len(IDS), **options: Any) -> np.ndarray:
    """Logits float32 [T, V] of the folder's graph in ONNX Runtime, so many tokens at a time."""
    with Artifact.open(folder) as artifact, closing(Table.open(artifact, "ram")) as table:
        runtime = open_runtime(artifact, "cpu", RuntimeOptions(threads=1, **options))
        with Feeder(runtime, table, 1, chunk) as feeder:
            parts = [
                np.array(feeder.score(0, IDS[at : at + chunk]), np.float32)
                for at in range(0, len(IDS), chunk)
            ]
        runtime.close()
    return np.concatenate(parts)


@pytest.fixture(params=FORMS, ids=name_of)
def folder(request: pytest.FixtureRequest, make_artifact: MakeArtifact) -> Path:
    return make_artifact(**request.param)


def test_what_is_written_is_what_was_read(folder: Path) -> None:
    content = content_of(folder)
    written = write_message("model", read_messages(content), content)
    assert onnx.load_from_string(written) == onnx.load_from_string(content)


def test_nothing_is_float16_but_records_keys_and_values(folder: Path) -> None:
    found = read_graph(for_cpu(content_of(folder)).content, rewritten=True)
    halves = {each.name for each in found.inputs if each.data_type == onnx.TensorProto.FLOAT16}
    stored = ("past_key_values.", "embedding", "memory_rows", "memory_scales")
    assert all(name.startswith(stored) for name in halves)
    angles = {"cos_cache", "sin_cache"} if any("past" in name for name in halves) else set()
    tensors = found.tensors.values()
    assert {t.name for t in tensors if t.data_type == onnx.TensorProto.FLOAT16} <= angles
    kinds = {each.op_type for each in found.nodes for name in each.inputs if name in halves}
    assert kinds <= {"Cast", "GroupQueryAttention"}


def test_it_computes_what_the_stored_graph_does(folder: Path) -> None:
    stored, found = logits_of(folder, own_dtype=True), logits_of(folder)
    # Inputs of products are rounded to 8 bits, here and there to another code; a wrong wire is 1.
    assert np.abs(found - stored).mean() < 0.015 * stored.std()
    assert not np.array_equal(found, stored)  # float16 rounds


# --- windows -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    return export_gates(write_gates(folder / "model"), folder / "out")


def test_all_readers_share_one_cut(gates: Path) -> None:
    found = read_graph(for_cpu(content_of(gates), floats=False).content)
    cuts = {each.outputs[0] for each in found.nodes if each.outputs[0].endswith(".key/cut")}
    assert len(cuts) == 1
    readers = [each for each in found.nodes if cuts & set(each.inputs)]
    assert len(readers) > 1
    assert {each.op_type for each in readers} == {"GroupQueryAttention"}


def test_codes_are_not_cut(gates: Path, tmp_path: Path) -> None:
    options = {"graph_weights": "int8", "kv_dtype": "int8"}
    path = export_gates(gates.parent / "model", tmp_path / "codes", **options)
    nodes = read_graph(for_cpu(content_of(path)).content, rewritten=True).nodes
    assert not [each for each in nodes if each.outputs[0].endswith("/cut")]


@pytest.mark.parametrize("chunk", [1, 7, 25, len(IDS)])
def test_a_cut_changes_no_number(gates: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = logits_of(gates, chunk)
    monkeypatch.setattr("edge_memllm_runtimes.cpu_graph.rewriting.cut_windows", lambda graph: None)
    whole = logits_of(gates, chunk)
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_texts_of_several_lengths_are_cut_by_the_shortest(
    gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last() -> list[np.ndarray]:
        found = []
        with Artifact.open(gates) as artifact, closing(Table.open(artifact, "ram")) as table:
            runtime = open_runtime(artifact, "cpu", RuntimeOptions(threads=1))
            with Feeder(runtime, table, 3, 60) as feeder:
                for sequence, length in enumerate((50, 3, 21)):
                    feeder.prefill(sequence, IDS[:length])
                found += [np.array(feeder.decode([token] * 3)) for token in IDS[-4:]]
            runtime.close()
        return found

    cut = last()
    monkeypatch.setattr("edge_memllm_runtimes.cpu_graph.rewriting.cut_windows", lambda graph: None)
    for one, other in itertools.zip_longest(cut, last()):
        np.testing.assert_allclose(one, other, atol=2e-5)
