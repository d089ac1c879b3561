"""What training changed in a checkpoint's memory, as an overlay for exports of the other one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ExportError
from edge_memllm.overlays import open_overlay
from edge_memllm.overlays.compatibility import check_same_but_rows
from edge_memllm.overlays.table import OverlaidTable
from edge_memllm.table.table import Table
from edge_memllm_export import checkpoint_difference, export_model
from support.checkpoints import MakeCheckpoint, change_config
from support.overlays import row

Change = Callable[[dict[str, np.ndarray]], None]


def trained_on(checkpoint: Path, out: Path, change: Change) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(checkpoint, out)
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def other_values(weights: dict[str, np.ndarray]) -> None:
    """Another direction of what the FFN-M of layer 1 gives."""
    weights["model.layers.1.memory.down_proj.weight"][:5] *= -1


@pytest.mark.parametrize("beta", [0, 3])
def test_an_overlay_of_a_difference_is_the_trained_checkpoint(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, out: Path, beta: int
) -> None:
    base = make_checkpoint(beta=beta)
    tuned = trained_on(base, tmp_path / "tuned", other_values)
    found = checkpoint_difference(base, tuned, out, name="tuned", codec="f32")
    assert {edit.layer for edit in open_overlay(out).edits()} == {1}
    assert (found.written.entries, found.compared) == (300, 600)
    forms = {"graph_weights": "fp32", "table_codec": "f32", "verify": False}
    for path, name in ((base, "a"), (tuned, "b")):
        export_model(path, tmp_path / name, **forms)
    with Artifact.open(tmp_path / "a") as ours, Artifact.open(tmp_path / "b") as theirs:
        open_overlay(out).check_fits(ours.manifest)
        check_same_but_rows(ours, theirs, tolerance=0)
        tables = [Table.open(each, "pread") for each in (ours, theirs)]
    every = np.arange(300)
    over = OverlaidTable(tables[0], [open_overlay(out)], 300)
    np.testing.assert_array_equal(over.rows(every), tables[1].rows(every))
    for each in tables:
        each.close()


@pytest.mark.parametrize("source", ["table", "both"])
def test_trained_rows_may_differ(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, out: Path, source: str
) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["model.token_memory.rows.weight"][17, 64:] = row(1)

    base = make_checkpoint(beta=3, memory_source=source)
    checkpoint_difference(base, trained_on(base, tmp_path / "t", change), out, name="t")
    (edit,) = open_overlay(out).edits()
    assert (edit.token, edit.layer, edit.operation) == (17, 1, "replace")


@pytest.mark.parametrize(
    "weight", ["model.embed_tokens", "model.norm", "model.layers.0.self_attn.q_proj"]
)
def test_other_weights_that_differ_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, out: Path, weight: str
) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[f"{weight}.weight"][0] += 1

    base = make_checkpoint(beta=3)
    tuned = trained_on(base, tmp_path / "tuned", change)
    with pytest.raises(ExportError, match=f"{weight}.weight is not that of .* Train the rows"):
        checkpoint_difference(base, tuned, out, name="tuned")
    assert not out.exists()


def test_checkpoints_of_other_forms(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, out: Path
) -> None:
    base = make_checkpoint(beta=3)
    tuned = trained_on(base, tmp_path / "tuned", other_values)
    change_config(tuned, rms_norm_eps=1e-5)
    with pytest.raises(ExportError, match=r"rms_norm_eps is 1e-05, that of .* is 1e-06"):
        checkpoint_difference(base, tuned, out, name="tuned")
    dense = make_checkpoint(beta=8)
    with pytest.raises(ExportError, match=r"a model without token memory \(dense\) has no rows"):
        checkpoint_difference(dense, dense, out, name="dense")
