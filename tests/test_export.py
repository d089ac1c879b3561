"""Exports as a user meets them: what is written, what is refused, what is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeArtifact, MakeCheckpoint
from safetensors.torch import load_file, save_file

from edge_memllm.artifact import Artifact
from edge_memllm.errors import ExportError, RuntimeUnavailableError
from edge_memllm.table import Table
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.table_rows import default_chunk, table_rows

TEXT = "It was the best of times, it was the worst of times. " * 4


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of its own, to be changed at will."""
    return Path(shutil.copytree(make_checkpoint(beta=3), tmp_path / "checkpoint"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change_config(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = {name: w.clone() for name, w in load_file(checkpoint / "model.safetensors").items()}
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def split_weights(checkpoint: Path) -> None:
    """Spread the weights over two files, as Hugging Face does with large models."""
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name].clone() for name in part}, checkpoint / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()


# --- what is written ---------------------------------------------------------------------------


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
    assert {stage for stage, _, _ in stages} == {"identity", "graph", "table", "ladder", "quality"}
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
        assert artifact.manifest.layout.record_bytes == 64 * 2


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
        assert artifact.manifest.model.head_dim == 16


def test_record_alignment_is_that_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(checkpoint, tmp_path / "out", alignment=4096, verify=False)
    assert report.manifest.table.stride == 4096


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_computed_in_float32_whatever_the_weights_are(
    dtype: str, make_checkpoint: MakeCheckpoint
) -> None:
    source = Checkpoint.open(make_checkpoint(beta=2, dtype=dtype))
    wide = source.network().float()
    for embedding, rows in table_rows(source.network(), chunk=128):
        assert embedding.dtype == rows.dtype == np.float32
    with torch.inference_mode():
        expected = wide.model.memory_rows(torch.arange(256, 300)).numpy()
    assert np.abs(rows - expected).max() < 1e-5


def test_rows_in_bfloat16_are_close(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = export_model(
        make_checkpoint(), tmp_path / "out", compute_dtype="bfloat16", graph_weights="int8",
        quality_text=TEXT,
    )  # fmt: skip
    with Artifact.open(report.path) as artifact:
        table = Table.open(artifact, "pread")
        rows = table.rows(np.arange(300))
        table.close()
    exact = np.concatenate([r for _, r in table_rows(Checkpoint.open(make_checkpoint()).network())])
    assert 0.005 < np.abs(rows - exact).max() < 0.03 * np.abs(exact).max()


def test_chunks_cover_the_vocabulary_and_report_progress(make_checkpoint: MakeCheckpoint) -> None:
    done: list[tuple[int, int]] = []
    network = Checkpoint.open(make_checkpoint()).network()
    sizes = [
        len(rows) for _, rows in table_rows(network, chunk=128, progress=lambda *d: done.append(d))
    ]
    assert sizes == [128, 128, 44]
    assert done == [(128, 300), (256, 300), (300, 300)]
    assert default_chunk(24, 2048) * 24 * 2048 * 4 <= 128 << 20
    assert default_chunk(2, 64) == 1024


def test_sharded_checkpoint_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(checkpoint).identity()
    export_model(checkpoint, tmp_path / "one", verify=False)
    split_weights(checkpoint)
    assert Checkpoint.open(checkpoint).identity() == before
    export_model(checkpoint, tmp_path / "two", verify=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_identity_is_that_of_the_model(checkpoint: Path) -> None:
    before = Checkpoint.open(checkpoint).identity()
    change_config(checkpoint, eos_token_id=5, memory_gain=[1.0, 1.0])  # neither changes a logit
    assert Checkpoint.open(checkpoint).identity() == before
    change_config(checkpoint, memory_gain=[1.0, 0.5])
    assert Checkpoint.open(checkpoint).identity() != before
    change_config(checkpoint, memory_gain=None)
    change_weights(checkpoint, lambda w: w["model.norm.weight"][:1].add_(1e-3))
    assert Checkpoint.open(checkpoint).identity() != before


# --- what is refused ---------------------------------------------------------------------------


def drop(name: str) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / name).unlink()


def as_pickle(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")


def lose_shard(checkpoint: Path) -> None:
    split_weights(checkpoint)
    (checkpoint / "model-2.safetensors").unlink()


def index_into(name: object) -> Callable[[Path], Any]:
    index = json.dumps({"weight_map": {"lm_head.weight": name}})
    return lambda checkpoint: (checkpoint / "model.safetensors.index.json").write_text(index)


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 3000)


WRONG_CHECKPOINTS: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, r"checkpoint: no such folder"),
    (drop("config.json"), r"config\.json: no such file"),
    (lambda c: (c / "config.json").write_text("{"), r"config\.json: this is not JSON"),
    (lambda c: (c / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
    (lambda c: change_config(c, model_type="llama"), r"model_type is 'llama', expected 'edge_mem"),
    (lambda c: change_config(c, beta=9), r"config\.json: describes no network: beta is 9"),
    (lambda c: change_config(c, hidden_size="64"), r"config\.json: describes no network: .* str"),
    (
        lambda c: change_config(
            c, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        r"rope_type is 'linear'; only 'default'",
    ),
    (drop("model.safetensors"), r"found no weights, expected model\.safetensors or"),
    (as_pickle, r"found pytorch_model\.bin but no model\.safetensors\. Pickled weights are not"),
    (lose_shard, r"model-2\.safetensors: cannot be read as safetensors"),
    (index_into("../other.safetensors"), r"a file name has a folder in it"),
    (index_into(5), r"expected 'weight_map' to name a file per weight"),
    (truncate, r"model\.safetensors: cannot be read as safetensors"),
    (
        lambda c: change_weights(c, lambda w: {k: v for k, v in w.items() if "norm" not in k}),
        r"lacks the weight model\.layers\.0\.input_layernorm\.weight.*beta 3, 2 layers",
    ),
    (
        lambda c: change_weights(c, lambda w: w | {"extra": torch.zeros(1)}),
        r"holds a weight extra",
    ),
    (
        lambda c: change_weights(c, lambda w: w | {"lm_head.weight": torch.zeros(300, 32)}),
        r"lm_head\.weight is \[300, 32\], config\.json makes it \[300, 64\]",
    ),
    (
        lambda c: change_weights(
            c, lambda w: w | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}
        ),
        r"model\.norm\.weight is torch\.int32, expected float32",
    ),
    (
        lambda c: change_weights(c, lambda w: w["model.embed_tokens.weight"][7].fill_(1e6)),
        r"token 7, embedding: 1e\+06 cannot be stored",
    ),
    (
        lambda c: change_weights(
            c, lambda w: w["model.layers.1.memory.down_proj.weight"].fill_(torch.nan)
        ),
        r"token 0, memory row of layer 1: nan cannot be stored",
    ),
    (
        lambda c: (c / "generation_config.json").write_text('{"eos_token_id": 300}'),
        r"eos_token_ids",
    ),
    (drop("tokenizer.json"), r"no tokenizer\.json, so the loss of quality cannot be measured"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_CHECKPOINTS)
def test_wrong_checkpoints_are_refused(
    spoil: Callable[[Path], Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    spoil(checkpoint)
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", graph_weights="int8", quality_text=TEXT)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "checkpoint"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"graph_weights": "int5"},
            r"graph weights 'int5', expected one of int4, int8, fp16, fp32",
        ),
        ({"table_codec": "zip"}, r"table codec 'zip', expected one of f16, f32, int4"),
        ({"table_codec": "none"}, r"table codec none is for dense models"),
        ({"table_codec": "int8-g128"}, r"width 64 is not a multiple of the group size 128"),
        ({"alignment": 100}, r"alignment 100, expected a power of two"),
        ({"device": "tpu"}, r"device 'tpu', expected cpu or cuda"),
        ({"compute_dtype": "float64"}, r"compute dtype 'float64', expected float32 or bfloat16"),
        ({"chunk": 0}, r"chunk is 0, expected at least one token"),
        ({"quality_text": ""}, r"The quality text gives 0 tokens, at least 2 are needed"),
        (
            {"graph_weights": "int4", "table_codec": "int4", "quality_text": TEXT},
            r"Graph weights int4 and table codec int4-g32 cost .* of perplexity and a mean KL",
        ),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"torch finds no CUDA device"):
        export_model(checkpoint, tmp_path / "out", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_computed_on_cuda_are_those_of_the_cpu(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint())
    here, there = (next(table_rows(source.network(device)))[1] for device in ("cpu", "cuda"))
    assert np.abs(here - there).max() < 1e-5


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
        table_codec="int4",
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


# --- OUT ---------------------------------------------------------------------------------------


def test_existing_folder_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out", verify=False)
    before = files_of(tmp_path / "out")
    with pytest.raises(ExportError, match=r"out: exists already\. Choose another folder"):
        export_model(checkpoint, tmp_path / "out", graph_weights="int8", verify=False)
    assert files_of(tmp_path / "out") == before


def test_overwrite_replaces_an_artifact(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(checkpoint, out, verify=False)
    (out / "chat_template.jinja").write_text("of the old artifact")
    report = export_model(checkpoint, out, graph_weights="fp32", verify=False, overwrite=True)
    assert set(files_of(out)) == {*report.manifest.files, "manifest.json"}
    assert json.loads((out / "manifest.json").read_text())["graph"]["weights"] == "fp32"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_overwrite_that_fails_keeps_the_old_artifact(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "out", verify=False)
    before = files_of(tmp_path / "out")
    with pytest.raises(ExportError, match=r"The quality text gives 0 tokens"):
        export_model(checkpoint, tmp_path / "out", quality_text="", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "folder"])
def test_overwrite_refuses_what_is_not_an_artifact(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name == "folder":
        (out / name).mkdir()
    else:
        (out / name).write_text("{}")
    with pytest.raises(ExportError, match=r"out: exists and is not an artifact, so it is not repl"):
        export_model(checkpoint, out, verify=False, overwrite=True)
    assert (out / name).exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_out_that_is_no_folder_is_refused(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    export_model(checkpoint, target, verify=False)
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(target)
    for overwrite in (False, True):
        with pytest.raises(ExportError, match=r"out: exists"):
            export_model(checkpoint, out, verify=False, overwrite=overwrite)
    assert out.is_symlink() or out.read_text() == "mine"


def test_empty_folder_is_used(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_model(checkpoint, tmp_path / "out", verify=False)
    Artifact.open(tmp_path / "out").close()


def test_second_export_into_the_same_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "graph.onnx").write_text("of the other export")
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(
            ExportError, match=r"out\.partial: another export into .*out is running"
        ):
            export_model(checkpoint, tmp_path / "out", verify=False)
        assert (partial / "graph.onnx").exists()
    finally:
        os.close(lock)
    export_model(checkpoint, tmp_path / "out", verify=False)
    assert not partial.exists()


def test_foreign_partial_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "photos").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"out\.partial: holds a folder, photos, that no export"):
        export_model(checkpoint, tmp_path / "out", verify=False)
    (tmp_path / "two.partial").write_text("mine")
    with pytest.raises(ExportError, match=r"two\.partial: cannot be made a folder"):
        export_model(checkpoint, tmp_path / "two", verify=False)


def test_folder_that_cannot_be_written_is_said(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"writing failed \(.*\)\. Check free space"):
        export_model(checkpoint, tmp_path / "file" / "out", verify=False)
