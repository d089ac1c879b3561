"""The head out of the graph file: refused where it is not what the manifest says."""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edge_memllm import ArtifactError, StorageError
from edge_memllm.artifact.folder import Artifact
from edge_memllm_export.graph.model import save_graph
from edge_memllm_runtimes.graph_head import GraphHead
from support.checkpoints import HIDDEN, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.graphs import manifest_of, seal
from support.interpretation import network_memory

SOME = np.array([5, 6, 7, 299, 0, 0, 12])


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_any_rows_are_those_of_the_whole(weights: str, make_artifact: MakeArtifact) -> None:
    with Artifact.open(make_artifact(graph_weights=weights)) as artifact:
        head = GraphHead(artifact)
        whole = head.rows(np.arange(VOCABULARY))
        assert whole.shape == (VOCABULARY, HIDDEN)
        np.testing.assert_array_equal(head.rows(SOME), whole[SOME])
        head.close()
        head.close()


def test_weights_beside_the_graph_are_found(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_artifact(graph_weights="fp32"), tmp_path / "artifact"))
    names = save_graph(ir.load(path / "graph.onnx"), path, self_contained_bytes=0)
    with Artifact.open(make_artifact(graph_weights="fp32")) as artifact:
        manifest = artifact.manifest
    specs = {name: _spec(path / name) for name in names}
    changed = dataclasses.replace(
        manifest,
        graph=dataclasses.replace(manifest.graph, external_data=names[1]),
        files=manifest.files | specs,
    )
    (path / "manifest.json").write_bytes(changed.to_json())
    with Artifact.open(path) as artifact:
        head = GraphHead(artifact)
        expected = network_memory(make_checkpoint()).head
        np.testing.assert_allclose(head.head.directions(SOME), expected.directions(SOME), atol=1e-6)
        head.close()


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"hidden_size": 2 * HIDDEN}, "int8", "has 128 bytes, too few for the manifest's shape"),
        ({"vocab_size": 7 * VOCABULARY}, "int8", "the head has 300 rows, the manifest says 2100"),
        ({"vocab_size": 2 * VOCABULARY}, "fp32", "too few for the manifest's shape"),
    ],
)
def test_a_head_of_another_shape_is_refused(
    changes: dict[str, int], weights: str, message: str, make_artifact: MakeArtifact
) -> None:
    with Artifact.open(make_artifact(graph_weights=weights)) as artifact:
        model = dataclasses.replace(artifact.manifest.model, **changes)
        artifact.manifest = dataclasses.replace(artifact.manifest, model=model)
        with (
            pytest.raises(ArtifactError, match=message),
            closing(GraphHead(artifact)) as head,
        ):
            head.rows(np.arange(model.vocab_size))


def test_a_graph_of_another_exporter_is_refused(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_artifact(), tmp_path / "artifact"))
    graph, manifest = path / "graph.onnx", manifest_of(path)
    content = graph.read_bytes()
    for name in (b"model.norm.weight", b"lm_head.weight_codes"):
        graph.write_bytes(content.replace(name, name[::-1]))
        seal(path, manifest)
        with (
            Artifact.open(path) as artifact,
            pytest.raises(ArtifactError, match=f"has no weight {name.decode()}. Export again"),
        ):
            GraphHead(artifact)


def test_a_file_cut_while_it_is_open_is_an_error(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_artifact(), tmp_path / "artifact"))
    with Artifact.open(path) as artifact:
        head = GraphHead(artifact)
        os.truncate(path / "graph.onnx", 100)
        with pytest.raises(StorageError, match=r"ends at \d+, \d+ bytes early"):
            head.rows(SOME)
        head.close()


def _spec(path: Path):
    from edge_memllm.artifact.atomic import seal

    return seal(path)
