"""Prompts over int8 keys and values: float32 for many tokens, the operator's own way for few."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.table.table import Table
from edge_memllm_runtimes.cpu_graph import for_cpu, prompts
from edge_memllm_runtimes.graph_file import read_graph
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.ort_graph import read_checked_graph
from edge_memllm_runtimes.runtime import open_runtime
from support.checkpoints import MakeArtifact
from support.gates import export_gates, write_gates

pytest.importorskip("onnx")

IDS = np.random.default_rng(5).integers(0, 256, 150).tolist()
FORMS: list[dict[str, Any]] = [
    {"beta": 3},
    {"beta": 2, "num_key_value_heads": 2, "attention_bias": True},
    {"beta": 3, "qk_norm": True},
    {"beta": 8, "num_attention_heads": 4, "hidden_size": 96},  # heads of 24, 32 in the graph
]


@pytest.fixture(params=FORMS, ids=lambda form: str(form).strip("{}"))
def folder(request: pytest.FixtureRequest, make_artifact: MakeArtifact) -> Path:
    return make_artifact(
        **{"graph_weights": "int8", "table_codec": "int4-g32", "kv_dtype": "int8"} | request.param
    )


def ran(folder: Path, batch: int, run: Callable[[Feeder], None]) -> list[dict[str, np.ndarray]]:
    """What is stored of each sequence after a run."""
    with Artifact.open(folder) as artifact, closing(Table.open(artifact, "ram")) as table:
        runtime = open_runtime(artifact, "cpu", RuntimeOptions(threads=1, own_kernels=False))
        with Feeder(runtime, table, batch, 128) as feeder:
            run(feeder)
            stored = [feeder.cache.state(sequence) for sequence in range(batch)]
            stored = [{name: each.copy() for name, each in state.items()} for state in stored]
        runtime.close()
    return stored


def compared(
    monkeypatch: pytest.MonkeyPatch, folder: Path, batch: int, run: Callable[[Feeder], Any]
) -> None:
    """Run with branches from two tokens on and without any; what is stored must be the same."""
    logits: list[list[np.ndarray]] = []

    def noted(feeder: Feeder) -> None:
        logits.append([np.array(each, np.float32) for each in run(feeder)])

    monkeypatch.setattr(prompts, "MANY", 2)
    found = ran(folder, batch, noted)
    monkeypatch.setattr(
        "edge_memllm_runtimes.cpu_graph.rewriting.attend_in_floats", lambda graph: None
    )
    expected = ran(folder, batch, noted)
    for one, other in zip(found, expected, strict=True):
        for name, codes in one.items():
            assert codes.dtype == np.int8
            if name.startswith("0."):  # of the first layer, which no other addition comes before
                np.testing.assert_array_equal(codes, other[name])
            assert np.abs(codes.astype(int) - other[name]).max() <= 2
    for each, other_logits in itertools.zip_longest(*logits):
        assert np.abs(each - other_logits).max() < 0.05 * other_logits.std()


def test_a_prompt_in_chunks_stores_and_computes_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(feeder: Feeder) -> list[np.ndarray]:
        found = [np.array(feeder.score(0, IDS[at : at + 50])) for at in (0, 50)]
        found.append(np.array(feeder.decode([IDS[100]])))
        return [*found, np.array(feeder.score(0, IDS[101:]))]

    compared(monkeypatch, folder, 1, run)


def test_layers_with_windows_and_layers_that_read_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gates(tmp_path / "model")
    out = export_gates(path, tmp_path / "out", graph_weights="int8", kv_dtype="int8")

    def run(feeder: Feeder) -> list[np.ndarray]:
        found = [np.array(feeder.score(0, IDS[at : at + 20])) for at in (0, 20, 40)]
        return [*found, np.array(feeder.decode([IDS[60]]))]

    compared(monkeypatch, out, 1, run)


def test_texts_of_several_lengths_side_by_side(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(feeder: Feeder) -> list[np.ndarray]:
        for sequence, length in enumerate((40, 3, 17)):
            feeder.prefill(sequence, IDS[:length])
        found = [np.array(feeder.decode(IDS[70:73]))]
        return [
            *found,
            np.array(feeder.prefill(1, IDS[80:90])),
            np.array(feeder.decode(IDS[90:93])),
        ]

    compared(monkeypatch, folder, 3, run)


def test_only_codes_of_all_positions_get_branches(make_artifact: MakeArtifact) -> None:
    for kv_dtype, expected in (("int8", True), ("float16", False)):
        path = make_artifact(graph_weights="int8", kv_dtype=kv_dtype)
        with Artifact.open(path) as artifact:
            content = for_cpu(read_checked_graph(artifact).content).content
            layers = artifact.manifest.model.num_hidden_layers
        kinds = [each.op_type for each in read_graph(content, rewritten=True).nodes]
        assert kinds.count("If") == layers * expected
        assert kinds.count("GroupQueryAttention") == layers * (not expected)


def test_a_graph_of_an_artifact_has_no_branches(make_artifact: MakeArtifact) -> None:
    from edge_memllm.errors import ArtifactError

    path = make_artifact(graph_weights="int8", kv_dtype="int8")
    with Artifact.open(path) as artifact:
        content = for_cpu(read_checked_graph(artifact).content).content
    with pytest.raises(ArtifactError, match="a graph in an attribute"):
        read_graph(content)
