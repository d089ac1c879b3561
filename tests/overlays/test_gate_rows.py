"""Rows that are gates, changed and turned off: against transformers' network, changed alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edge_memllm
from edge_memllm import Model
from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import RequestError
from edge_memllm.overlays import OverlaySpec, open_overlay, overlay_of
from edge_memllm.overlays.compatibility import check_same_shape
from edge_memllm.overlays.making import Alteration, edits_of
from edge_memllm_export import checkpoint_difference
from support.checkpoints import write_dense
from support.gates import (
    IDS,
    LAYERS,
    WIDTH,
    artifact_logits,
    export_gates,
    network_logits,
    write_gates,
)

OTHER = 65
CHANGED = tuple(sorted(set(IDS[5:30])))
SOME = (1, 4, 6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gates(tmp_path_factory.mktemp("gates") / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[Model]:
    path = export_gates(checkpoint, checkpoint.parent / "artifact")
    with edge_memllm.load(path, device="cpu", threads=1) as model:
        yield model


def laid_over(model: Model, **way: Any) -> np.ndarray:
    """Logits under an overlay that alters some tokens."""
    spec = OverlaySpec.for_model(model.manifest, "altered", codec="f32")
    edits = edits_of([Alteration(CHANGED, **way)], model.table)
    name = model.add_overlay(overlay_of(spec, edits))
    try:
        return artifact_logits(model, model.records([name]), IDS)
    finally:
        model.remove_overlay(name)


def network_altered(checkpoint: Path, layers: tuple[int, ...], factor: float) -> np.ndarray:
    def change(rows: Any) -> None:
        for place, token in enumerate(IDS):
            if token in CHANGED:
                rows[place, list(layers)] *= factor

    return network_logits(checkpoint, IDS, change)


@pytest.mark.parametrize(("way", "factor"), [({"blank": True}, 0.0), ({"scale": 0.5}, 0.5)])
def test_blank_and_scaled_rows_act_as_in_the_network(
    checkpoint: Path, model: Model, way: dict[str, Any], factor: float
) -> None:
    plain = artifact_logits(model, model.records(()), IDS)
    found = laid_over(model, layers=SOME, **way)
    assert np.abs(found - network_altered(checkpoint, SOME, factor)).max() < 1e-4
    assert np.abs(found - plain).max() > 0.5


def test_a_row_of_another_token_acts_as_in_the_network(checkpoint: Path, model: Model) -> None:
    other = model.table.rows(np.array([OTHER]))[0]

    def change(rows: Any) -> None:
        for place, token in enumerate(IDS):
            if token in CHANGED:
                rows[place] = rows.new_tensor(other)

    found = laid_over(model, like=OTHER)
    assert np.abs(found - network_logits(checkpoint, IDS, change)).max() < 1e-4


def test_scaling_is_felt_and_has_a_ceiling(model: Model) -> None:
    """The norm behind takes back the size of the sum, not how much of it is the row."""
    plain = artifact_logits(model, model.records(()), IDS)
    found = {factor: laid_over(model, scale=factor) for factor in (0.9, 2.0, 1e3, 1e4)}
    assert np.abs(found[0.9] - plain).max() > 0.1
    assert np.abs(found[2.0] - plain).max() > 1
    assert np.abs(found[1e4] - found[1e3]).max() < 0.1


def test_memory_off_is_the_network_without_what_gates_let_through(
    checkpoint: Path, model: Model
) -> None:
    found = artifact_logits(model, model.records(without_memory=True), IDS)
    expected = network_logits(checkpoint, IDS, factors=[0.0] * LAYERS)
    assert np.abs(found - expected).max() < 1e-4
    blank = network_logits(checkpoint, IDS, lambda rows: rows.zero_())
    assert np.abs(found - blank).max() > 1


def test_trained_gates_are_a_difference(
    checkpoint: Path, model: Model, tmp_path: Path, out: Path
) -> None:
    tuned = Path(shutil.copytree(checkpoint, tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    rows = weights["model.embed_tokens_per_layer.weight"].reshape(-1, LAYERS, WIDTH)
    rows[IDS[0], 3] *= -1
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    checkpoint_difference(checkpoint, tuned, out, name="tuned", codec="f32")
    (edit,) = open_overlay(out).edits()
    assert (edit.token, edit.layer, edit.operation) == (IDS[0], 3, "replace")
    name = model.add_overlay(out)
    found = artifact_logits(model, model.records([name]), IDS)
    model.remove_overlay(name)
    assert np.abs(found - network_logits(tuned, IDS)).max() < 1e-4


def test_weights_that_are_no_rows_are_named_for_this_family(
    checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    tuned = Path(shutil.copytree(checkpoint, tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(edge_memllm.EdgeMemLLMError, match="Train the rows alone"):
        checkpoint_difference(checkpoint, tuned, out, name="tuned")


def test_gates_of_another_family_are_not_grafted(checkpoint: Path, tmp_path: Path) -> None:
    base = export_gates(checkpoint, tmp_path / "base")
    donor = write_dense(tmp_path / "donor", "gemma3n_text", hidden_size_per_layer_input=WIDTH)
    with (
        Artifact.open(base) as ours,
        Artifact.open(export_gates(donor, tmp_path / "out")) as theirs,
        pytest.raises(RequestError, match=r"architecture is gemma3n_text, that of .* gemma4_text"),
    ):
        check_same_shape(ours, theirs)
