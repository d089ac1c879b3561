"""Exporting tables of every codec: judged like any other, deterministic, options never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge_memllm
from edge_memllm import Sampling
from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import CorruptionError, ExportError
from edge_memllm.modeling.rows import NetworkRows
from edge_memllm.table.table import Table
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export import export_model
from edge_memllm_export.architectures import memoryllm
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import MakeArtifact, MakeCheckpoint, files_of

GREEDY = Sampling(temperature=0.0)
WORDS = ("bf16", "fp8", "nested8", "int4a", "nf4", "codebook4", "int3", "int2", "lowrank-50")


def rows_of(path: Path) -> np.ndarray:
    with Artifact.open(path) as artifact:
        table = Table.open(artifact, "pread")
    rows = table.rows(np.arange(artifact.manifest.model.vocab_size))
    table.close()
    return rows


@pytest.mark.parametrize("codec", WORDS)
def test_every_codec_climbs_the_ladder(
    codec: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    report = export_model(
        make_checkpoint(),
        tmp_path / "out",
        graph_weights="fp32",
        table_codec=codec,
        accept_quality_loss=True,
    )
    assert all(rung.ok for rung in report.rungs), report.rungs
    with edge_memllm.load(report.path) as model:
        assert len(model.generate("Hello", max_new_tokens=3, sampling=GREEDY)) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"table_codec": "codebook3", "table_text": "some text"},
        {"table_codec": "lowrank-50-f16", "table_text": "some text"},
        {"table_codec": "int4", "table_search": True},
    ],
)
def test_exporting_again_gives_the_same_bytes(
    options: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        export_model(make_checkpoint(), tmp_path / name, verify=False, **options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_search_makes_the_table_more_exact(
    make_checkpoint: MakeCheckpoint, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    export_model(
        make_checkpoint(), tmp_path / "out", table_codec="int4", table_search=True, verify=False
    )
    exact = NetworkRows(Checkpoint.open(make_checkpoint()).architecture.reference().network).rows(
        np.arange(300)
    )
    plain = make_artifact(table_codec="int4")
    errors = [np.square(rows_of(path) - exact).mean() for path in (tmp_path / "out", plain)]
    assert errors[0] < 0.99 * errors[1]


def test_tokens_of_the_text_count(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """With one token repeated, that one is stored better than with all tokens equal."""
    checkpoint = make_checkpoint()
    exact = NetworkRows(Checkpoint.open(checkpoint).architecture.reference().network).rows(
        np.arange(300)
    )
    token = Tokenizer((checkpoint / "tokenizer.json").read_bytes()).encode("e")[0]
    errors = []
    for name, text in (("even", None), ("uneven", "e" * 100_000)):
        out = tmp_path / name
        export_model(checkpoint, out, table_codec="lowrank-50-f16", table_text=text, verify=False)
        errors.append(np.square(rows_of(out) - exact)[token].mean())
    assert errors[1] < 0.1 * errors[0]


def test_damaged_parameters_are_found_when_the_table_is_opened(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_model(make_checkpoint(), out, table_codec="codebook3", verify=False)
    content = bytearray((out / "table.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "table.safetensors").write_bytes(content)
    with (
        Artifact.open(out) as artifact,
        pytest.raises(CorruptionError, match=r"sha256 of the parameters is \w+, the manifest says"),
    ):
        Table.open(artifact, "pread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table_search": True}, "table search: codec int8-g64 has no scales to search for"),
        ({"table_text": "x"}, "table text: codec int8-g64 learns nothing from a text. Leave it"),
        ({"table_codec": "lowrank-r128-f16"}, "the rank is 128, expected at most the width 64"),
    ],
)
def test_options_that_change_nothing_are_refused(
    options: dict[str, Any], message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(make_checkpoint(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_text_needs_the_right_tokenizer(
    checkpoint: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    options = {"table_codec": "codebook3", "table_text": "some text"}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    other = make_checkpoint(vocab_size=64, **special)
    with pytest.raises(ExportError, match=r"tokenizer\.json is another model's: token \d+ is"):
        export_model(other, tmp_path / "out", **options)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"no tokenizer\.json, so the tokens of the table text"):
        export_model(checkpoint, tmp_path / "out", **options)


def test_nothing_is_learned_from_what_is_not_finite(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = memoryllm.network_over

    def broken(*arguments: Any) -> Any:
        network = real(*arguments)
        with torch.no_grad():
            network.model.layers[1].memory.down_proj.weight[0, 0] = float("nan")
        return network

    monkeypatch.setattr(memoryllm, "network_over", broken)
    with pytest.raises(ExportError, match="token 0, memory row of layer 1: not all values are fin"):
        export_model(
            checkpoint,
            tmp_path / "out",
            graph_weights="fp16",
            table_codec="codebook3",
            verify=False,
        )


def test_both_qualities_of_one_artifact_run(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_model(make_checkpoint(), out, table_codec="nested8", verify=False)
    described = []
    for quality in ("full", "coarse"):
        with edge_memllm.load(out, table_quality=quality) as model:
            model.generate("Hello", max_new_tokens=3, sampling=GREEDY)
            described.append(model.describe()["record_bytes"])
    assert described[0] - described[1] == 2 * 64 // 2
