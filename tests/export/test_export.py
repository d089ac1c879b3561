"""Exports as a user meets them: what is written and judged, and options that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ExportError, RuntimeUnavailableError
from edge_memllm.modeling.rows import NetworkRows
from edge_memllm.table.table import Table
from edge_memllm_export import export_model, verify_against
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import MakeArtifact, MakeCheckpoint, change_config, files_of

TEXT = "It was the best of times, it was the worst of times. " * 4


def test_export_is_complete_verified_and_leaves_nothing_else(
    checkpoint: Path, tmp_path: Path
) -> None:
    stages: list[tuple[str, int, int]] = []
    report = export_model(
        checkpoint,
        tmp_path / "new" / "out",
        graph_weights="int8",
        quality_text=TEXT,
        progress=lambda *stage: stages.append(stage),
    )
    assert report.path == tmp_path / "new" / "out"
    assert [file.name for file in report.path.parent.iterdir()] == ["out"]
    assert [rung.number for rung in report.rungs] == [1, 2, 3, 4, 5, 6]
    assert report.quality is not None
    assert report.quality.tokens == len(TEXT) - 1
    assert set(report.manifest.files) | {"manifest.json"} == set(files_of(report.path))
    assert report.manifest.model.eos_token_ids == (257,)
    with Artifact.open(report.path) as artifact:
        artifact.verify_digests()
        assert artifact.manifest == report.manifest
    assert {stage for stage, _, _ in stages} == {
        *("identity", "calibration", "plan", "graph", "table", "ladder", "quality", "answers")
    }
    assert all(0 <= done <= total for _, done, total in stages)
    assert ("table", 300, 300) in stages


@pytest.mark.parametrize(
    ("graph_weights", "table_codec", "found"),
    [
        ("int4", "int8", ("int4", "int8-g64", "q8", "float16")),
        ("fp16", "int4", ("fp16", "int4-g32", "q4", "float16")),
        ("int8", "int4-g64", ("int8", "int4-g64", "q4", "float16")),
        ("fp32", "f16", ("fp32", "f16", "f16", "float32")),
        ("fp32", "f32", ("fp32", "f32", "f32", "float32")),
    ],
)
def test_words_choose_the_form(
    graph_weights: str, table_codec: str, found: tuple[str, ...], make_artifact: MakeArtifact
) -> None:
    with Artifact.open(make_artifact(graph_weights=graph_weights, table_codec=table_codec)) as out:
        manifest = out.manifest
    form = (manifest.graph.weights, manifest.table.codec, manifest.graph.wire)
    assert (*form, manifest.table.embedding_dtype) == found
    assert manifest.graph.compute_dtype == manifest.table.embedding_dtype


def test_dense_model_has_no_rows_whatever_the_codec(make_artifact: MakeArtifact) -> None:
    with Artifact.open(make_artifact(table_codec="int4", beta=8)) as artifact:
        assert artifact.manifest.table.codec == "none"
        assert artifact.manifest.table.embedding_codec == "int8-g32"
        assert artifact.manifest.layout.record_bytes == 64 + 64 // 32 * 2


@pytest.mark.parametrize("options", [{}, {"graph_weights": "fp32", "table_codec": "f32"}])
def test_exporting_twice_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    for name in ("one", "two"):
        export_model(checkpoint, tmp_path / name, verify=False, **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_tokenizer_files_are_copied_and_others_are_not(checkpoint: Path, tmp_path: Path) -> None:
    copied = {"chat_template.jinja": b"{{ messages }}", "tokenizer_config.json": b"{}"}
    for name, content in (copied | {"training_state.json": b"{}"}).items():
        (checkpoint / name).write_bytes(content)
    export_model(checkpoint, tmp_path / "out", verify=False)
    found = files_of(tmp_path / "out")
    assert copied.items() <= found.items()
    assert found["tokenizer.json"] == (checkpoint / "tokenizer.json").read_bytes()
    assert "training_state.json" not in found


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, 9, (7, 8)),
        ({"eos_token_id": 7}, 9, (7,)),
        ({}, 9, (9,)),
        (None, [9, 10], (9, 10)),
        (None, None, ()),
    ],
)
def test_ends_of_text_are_those_of_generation_config_then_config(
    checkpoint: Path,
    tmp_path: Path,
    generation: dict[str, Any] | None,
    config: int | list[int] | None,
    expected: tuple[int, ...],
) -> None:
    change_config(checkpoint, eos_token_id=config)
    (checkpoint / "generation_config.json").unlink()
    if generation is not None:
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    report = export_model(checkpoint, tmp_path / "out", verify=False)
    assert report.manifest.model.eos_token_ids == expected


def test_padded_heads_are_in_the_manifest(make_artifact: MakeArtifact) -> None:
    with Artifact.open(make_artifact(head_dim=12)) as artifact:
        assert artifact.manifest.model.caches[0].head_dim == 16


@pytest.mark.parametrize(("beta", "stride"), [(0, 512), (8, 128)])
def test_records_without_memory_lie_closer(
    beta: int, stride: int, make_artifact: MakeArtifact
) -> None:
    with Artifact.open(make_artifact(beta=beta)) as artifact:
        assert artifact.manifest.table.stride % artifact.manifest.table.alignment == 0
        assert artifact.manifest.table.alignment == {0: 512, 8: 64}[beta]
        assert artifact.manifest.table.stride == stride


def test_record_alignment_is_that_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(checkpoint, tmp_path / "out", alignment=4096, verify=False)
    assert report.manifest.table.stride == 4096


def test_rows_in_bfloat16_are_close(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = export_model(
        make_checkpoint(), tmp_path / "out", compute_dtype="bfloat16", graph_weights="int8",
        quality_text=TEXT,
    )  # fmt: skip
    with Artifact.open(report.path) as artifact:
        table = Table.open(artifact, "pread")
        rows = table.rows(np.arange(300))
        table.close()
    exact = NetworkRows(Checkpoint.open(make_checkpoint()).architecture.reference().network).rows(
        np.arange(300)
    )
    assert 0.005 < np.abs(rows - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"graph_weights": "int5"},
            r"graph weights 'int5', expected one of auto, int2, int4, int8, fp16, fp32",
        ),
        ({"graph_block": 48}, r"graph block 48, expected one of 32, 64, 128, 256"),
        (
            {"graph_block": 64, "graph_weights": "fp16"},
            r"graph block 64 is for graphs in int2, int4, int8; the graph weights are fp16",
        ),
        (
            {"graph_block": 256, "graph_weights": "int8", "matrix_weights": {"o_proj": "int2"}},
            r"graph block 256 for int2: products of 2 bits are fast up to blocks of 128",
        ),
        (
            {"kv_dtype": "float16", "graph_weights": "fp32"},
            r"keys and values in float16: graph weights fp32 compute in float32",
        ),
        ({"kv_dtype": "int8", "graph_weights": "fp32"}, r"int8 with graph weights fp32: that form"),
        ({"table_codec": "zip"}, r"table codec 'zip', expected one of f32, f16, bf16"),
        ({"table_codec": "none"}, r"table codec none is for models without token memory"),
        ({"table_codec": "int8-g128"}, r"width 64 is not a multiple of the group size 128"),
        ({"alignment": 100}, r"alignment 100, expected a power of two"),
        ({"device": "tpu"}, r"device 'tpu', expected cpu or cuda"),
        ({"compute_dtype": "float64"}, r"compute dtype 'float64', expected float32 or bfloat16"),
        ({"chunk": 0}, r"chunk is 0, expected at least one token"),
        ({"quality_text": ""}, r"The quality text gives 0 tokens, at least 128 are needed"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


REFUSED = {"graph_weights": "int4", "table_codec": "int2", "quality_text": TEXT}


def test_a_loss_beyond_the_bounds_is_refused_with_what_helps(
    checkpoint: Path, tmp_path: Path
) -> None:
    message = (
        r"Graph weights int4 and table codec int2-g32 cost .* of perplexity and a mean KL .* "
        r"The table alone costs .* nats\. Choose a table codec of more bits\. Or accept the loss"
    )
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", **REFUSED, keep_refused=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_what_is_refused_for_its_loss_can_be_taken_all_the_same(
    checkpoint: Path, tmp_path: Path
) -> None:
    out, refused = tmp_path / "out", tmp_path / "out.refused"
    for _ in range(2):  # the second takes the place of the first
        with pytest.raises(ExportError, match=r"kept as .*out\.refused: rename it to out, or"):
            export_model(checkpoint, out, **REFUSED)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "out.refused"]
    refused.rename(out)
    Artifact.open(out).close()
    assert all(rung.ok for rung in verify_against(out, checkpoint))


def test_what_is_refused_takes_the_place_of_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "out.refused"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"Or accept the loss of quality\.$"):
        export_model(checkpoint, tmp_path / "out", **REFUSED)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "out.refused"]
    assert [entry.name for entry in other.iterdir()] == ["diary.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"torch finds no CUDA device"):
        export_model(checkpoint, tmp_path / "out", device="cuda")


def test_tokens_beyond_the_vocabulary_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    checkpoint = make_checkpoint(vocab_size=64, **special)
    with pytest.raises(ExportError, match=r"tokenizer\.json gives token \d+, the model has 64"):
        export_model(checkpoint, tmp_path / "out", graph_weights="int8")


def test_quality_loss_can_be_accepted(checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(
        checkpoint,
        tmp_path / "out",
        table_codec="int2",
        quality_text=TEXT,
        accept_quality_loss=True,
    )
    assert report.quality is not None
    assert not report.quality.acceptable


def test_without_tokenizer_the_loss_can_be_accepted_unmeasured(
    checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    report = export_model(checkpoint, tmp_path / "out", accept_quality_loss=True)
    assert report.quality is None
    assert len(report.rungs) == 6
