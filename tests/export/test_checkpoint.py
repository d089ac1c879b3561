"""Checkpoints: how their weights are read, rows computed from them, and which are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_memllm.errors import ExportError
from edge_memllm.modeling.rows import NetworkRows, default_chunk
from edge_memllm.table.source import counted
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import MakeCheckpoint, change_config, files_of

TEXT = "It was the best of times, it was the worst of times. " * 4


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_computed_in_float32_whatever_the_weights_are(
    dtype: str, make_checkpoint: MakeCheckpoint
) -> None:
    source = Checkpoint.open(make_checkpoint(beta=2, dtype=dtype))
    wide = source.architecture.reference().network.float()
    for embedding, rows in NetworkRows(source.architecture.reference().network, 128).chunks(
        np.arange(300)
    ):
        assert embedding.dtype == rows.dtype == np.float32
    with torch.inference_mode():
        expected = wide.model.memory_rows(torch.arange(256, 300)).numpy()
    assert np.abs(rows - expected).max() < 1e-5


def test_chunks_cover_the_vocabulary_and_report_progress(make_checkpoint: MakeCheckpoint) -> None:
    done: list[tuple[int, int]] = []
    network = Checkpoint.open(make_checkpoint()).architecture.reference().network
    chunks = NetworkRows(network, 128).chunks(np.arange(300))
    sizes = [len(rows) for _, rows in counted(chunks, 300, lambda *at: done.append(at))]
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_computed_on_cuda_are_those_of_the_cpu(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint())
    ids = np.arange(300)
    here, there = (
        NetworkRows(source.architecture.reference(device).network).rows(ids)
        for device in ("cpu", "cuda")
    )
    assert np.abs(here - there).max() < 1e-5


def drop(name: str) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / name).unlink()


def as_pickle(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")


def lose_shard(checkpoint: Path) -> None:
    split_weights(checkpoint)
    (checkpoint / "model-2.safetensors").unlink()


def index_into(name: object) -> Callable[[Path], Any]:
    index = json.dumps({"weight_map": {"lm_head.weight": name}})

    def change(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors.index.json").write_text(index)

    return change


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 3000)


WRONG_CHECKPOINTS: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, r"checkpoint: no such folder"),
    (drop("config.json"), r"config\.json: no such file"),
    (lambda c: (c / "config.json").write_text("{"), r"config\.json: this is not JSON"),
    (lambda c: (c / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
    (lambda c: change_config(c, model_type="gpt2"), r"model_type is 'gpt2', expected 'edge_mem"),
    (lambda c: change_config(c, beta=9), r"config\.json: describes no network: beta is 9"),
    (
        lambda c: change_config(c, hidden_size="64"),
        r"describes no network: hidden_size is '64'",
    ),
    (
        lambda c: change_config(
            c, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
        ),
        r"rope_type is 'yarn'; use one of default, linear, llama3",
    ),
    (drop("model.safetensors"), r"found no weights, expected model\.safetensors or"),
    (as_pickle, r"found pytorch_model\.bin but no model\.safetensors\. Pickled weights are not"),
    (lose_shard, r"model-2\.safetensors: no such file, and model\.safetensors\.index"),
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
        r"model\.norm\.weight is torch\.int32; weights are",
    ),
    (
        lambda c: change_weights(c, lambda w: w["model.embed_tokens.weight"][7].fill_(1e6)),
        r"token 7, embedding: 1e\+06 cannot be stored",
    ),
    (
        lambda c: change_weights(
            c, lambda w: w["model.layers.1.memory.down_proj.weight"].fill_(torch.nan)
        ),
        r"model\.layers\.1\.memory\.down_proj\.weight holds NaN or infinity",
    ),
    (
        lambda c: (c / "generation_config.json").write_text('{"eos_token_id": 300}'),
        r"config\.json: eos_token_id: token 0 is 300",
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
