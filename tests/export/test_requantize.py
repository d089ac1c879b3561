"""An artifact's table in another codec: the same model, as if it had been exported so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import edge_memllm
import edge_memllm.codecs
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.cli.main import main
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError, CorruptionError, ExportError
from edge_memllm_export import requantize
from edge_memllm_export import requantizer as module
from edge_memllm_export.requantizer import rewire_graph
from support.checkpoints import MakeArtifact, files_of
from support.graphs import change_graph

IDS = [1, 5, 9, 200, 5, 77, 42]

MEMORY = MemorySpec(2, 64, "added", (1.0, 1.0))


def logits(path: Path) -> np.ndarray:
    with (
        edge_memllm.load(path, threads=1) as model,
        Feeder(model.runtime, model.table, 1, len(IDS)) as feeder,
    ):
        return np.array(feeder.score(0, IDS))


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("codec", ["f16", "int8", "int4", "int8-g32"])
def test_it_computes_what_an_export_would(
    make_artifact: MakeArtifact, tmp_path: Path, weights: str, codec: str
) -> None:
    source = make_artifact(graph_weights=weights, table_codec="f32", beta=3)
    direct = make_artifact(graph_weights=weights, table_codec=codec, beta=3)
    report = requantize(source, tmp_path / "out", table_codec=codec)
    assert report.faithful_source
    assert report.graph_rewired
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(direct))
    for name in ("table.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (direct / name).read_bytes()


def test_the_same_form_leaves_the_graph_alone(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    source = make_artifact(table_codec="f16")
    report = requantize(source, tmp_path / "out", table_codec="bf16")
    assert not report.graph_rewired
    assert (tmp_path / "out" / "graph.onnx").read_bytes() == (source / "graph.onnx").read_bytes()


def test_another_group_of_the_same_form_is_another_graph(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    report = requantize(make_artifact(), tmp_path / "out", table_codec="int8-g32")
    assert report.graph_rewired
    assert not report.faithful_source
    assert report.mean_kl < 0.01


def test_a_memory_that_all_layers_share(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    source = make_artifact(
        beta=0, memory_sharing="all_layers", graph_weights="fp32", table_codec="f32"
    )
    report = requantize(source, tmp_path / "out", table_codec="int8")
    assert report.manifest.model.memory.layers == 1
    assert report.mean_kl < 0.01


def test_weights_beside_the_graph_stay_as_they_are(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    source = make_artifact(graph_weights="fp32", table_codec="f32")
    model = ir.load(source / "graph.onnx")
    ir.save(model, tmp_path / "graph.onnx", external_data="graph.onnx.data")
    before = (tmp_path / "graph.onnx.data").read_bytes()
    codec = edge_memllm.codecs.get_codec("int8-g64")
    rewire_graph(tmp_path / "graph.onnx", tmp_path / "new.onnx", "fp32", MEMORY, codec)
    assert (tmp_path / "graph.onnx.data").read_bytes() == before
    assert (tmp_path / "new.onnx").stat().st_size < len(before) / 4
    names = {value.name for value in ir.load(tmp_path / "new.onnx").graph.inputs}
    assert {"memory_codes", "memory_scales"} <= names
    assert "memory_rows" not in names


def test_a_codec_that_learns_sees_all_rows(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    source = make_artifact(table_codec="f32")
    report = requantize(source, tmp_path / "out", table_codec="lowrank-50")
    assert report.manifest.table.codec.startswith("lowrank-r32")
    with Artifact.open(tmp_path / "out") as artifact:
        artifact.verify_digests()


def test_twice_gives_the_same_bytes(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    for name in ("a", "b"):
        requantize(make_artifact(table_codec="f16"), tmp_path / name, table_codec="int4")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "artifact", "message"),
    [
        ({"table_codec": "zip"}, {}, "table codec 'zip', expected one of"),
        ({"table_codec": "int8-g128"}, {}, "width 64 is not a multiple of the group size 128"),
        ({"table_codec": "none"}, {}, "codec none: stores no memory rows, but there are 2 layers"),
        ({"table_codec": "f16", "table_search": True}, {}, "codec f16 has no scales to search"),
        (
            {"table_codec": "int8"},
            {"beta": 8},
            r"without token memory \(dense\) has no memory rows",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    options: dict[str, Any],
    artifact: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=message):
        requantize(make_artifact(**artifact), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_no_result(make_artifact: MakeArtifact) -> None:
    source = make_artifact()
    with pytest.raises(ExportError, match="the source cannot be its own result"):
        requantize(source, source, table_codec="int4", overwrite=True)


def test_what_is_there_is_kept_without_overwrite(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    requantize(make_artifact(), tmp_path / "out", table_codec="int4")
    before = files_of(tmp_path / "out")
    with pytest.raises(ExportError, match="exists"):
        requantize(make_artifact(), tmp_path / "out", table_codec="f16")
    assert files_of(tmp_path / "out") == before


def test_a_result_that_computes_something_else_is_refused(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compare_artifacts", lambda *_: (float("nan"), 64))
    with pytest.raises(ExportError, match=r"does not compute what .* computes: mean KL"):
        requantize(make_artifact(), tmp_path / "out", table_codec="int4")
    assert not (tmp_path / "out").exists()


def test_a_foreign_graph_is_refused(tmp_path: Path, make_artifact: MakeArtifact) -> None:
    dense = make_artifact(beta=8) / "graph.onnx"
    codec = edge_memllm.codecs.get_codec("int8-g64")
    with pytest.raises(ArtifactError, match="the part that takes in the table's rows was not"):
        rewire_graph(dense, tmp_path / "new.onnx", "int4", MEMORY, codec)


def test_a_hostile_graph_is_refused_before_a_library_reads_it(
    tmp_path: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(make_artifact(), tmp_path / "artifact"))
    change_graph(path, lambda model: setattr(model.graph.node[0], "op_type", "Expand"))
    monkeypatch.setattr(module, "rewire_graph", None)
    with pytest.raises(ArtifactError, match="it has the operator 'Expand', which no graph of ours"):
        requantize(path, tmp_path / "out", table_codec="f16")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_meanwhile_is_not_vouched_for(
    tmp_path: Path, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(make_artifact(), tmp_path / "artifact"))
    first_form = module._first_form

    def meanwhile(*given: Any) -> Any:
        (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes()[::-1])
        return first_form(*given)

    monkeypatch.setattr(module, "_first_form", meanwhile)
    with pytest.raises(CorruptionError, match=r"tokenizer\.json: changed while it was copied"):
        requantize(path, tmp_path / "out", table_codec="f16")
    assert not (tmp_path / "out").exists()


def test_no_torch_is_loaded(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edge_memllm_export import requantize; "
        f"requantize(Path({str(make_artifact())!r}), Path({str(tmp_path / 'out')!r}), "
        "table_codec='int4'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_command(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["requantize", str(make_artifact()), str(tmp_path / "out"), "--table-codec", "int4"]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert "int4-g32" in page
    assert "made from int8-g64: the error of that codec stays" in page
    assert main([*words, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source_codec"] == "int8-g64"
