"""Forms of a network's matrices, chosen by what they cost it; columns folded on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_memllm.codecs import get_codec
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision import Target
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph.model import GraphForm
from edge_memllm_export.graph_matrices import visit_matrices
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from edge_memllm_export.weights.allocation import Allocation, fewest_bytes, least_damage
from edge_memllm_export.weights.damage import Sensitivity
from edge_memllm_export.weights.planning import (
    FORMS,
    MatrixPlanner,
    WeighedForms,
    choose_forms,
    measured,
)
from support.checkpoints import MakeCheckpoint
from support.matrices import matrices_of

SHAPES: list[dict[str, Any]] = [
    {"beta": 0, "memory_gain": [0.5, -1.5]},
    {"beta": 2, "tie_word_embeddings": True},
    {"beta": 3, "num_key_value_heads": 2},
    {"beta": 0, "head_dim": 12},
    {"beta": 2, "attention_bias": True, "qk_norm": True},
    {"beta": 1, "memory_source": "both", "memory_norm": "shared"},
    {"beta": 8},
]
WINDOWS = [
    torch.tensor([[(7 * i * i + 3 * i + 31 * w) % 300 for i in range(64)]]) for w in range(4)
]


def planner(source: Checkpoint) -> tuple[MatrixPlanner, dict[str, WeighedForms]]:
    form = GraphForm("mixed", get_codec("f16"), "float16", method="gptq")

    def visit(each: Any) -> None:
        visit_matrices(source, form, each)

    names: list[str] = []
    visit(lambda name, weight: names.append(name))
    found = measured(source.architecture.reference(), names, WINDOWS, lambda done, total: None)
    made = MatrixPlanner(source.architecture, found)
    return made, made.weigh(visit, lambda name, columns: FORMS, lambda done, total: None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folding_leaves_the_network_as_it_is(
    shape: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The folded architecture in float32 climbs what the network climbs."""
    source = Checkpoint.open(make_checkpoint(**shape))
    made, weighed = planner(source)
    plan = made.plan({name: each.options(exact=False)[0] for name, each in weighed.items()})
    same = source.architecture.array("model.layers.0.self_attn.q_proj.weight")
    folded = plan.architecture.array("model.layers.0.self_attn.q_proj.weight")
    assert np.abs(folded / same - 1).max() > 0.1
    folding = Checkpoint(source._source, plan.architecture)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "open", classmethod(lambda cls, path: folding))
        export_model(source.path, out, graph_weights="fp32", table_codec=None, verify=False)
    ids = list(b"It was the best of times, it was the worst of times.")
    reference = source.architecture.reference()
    with JudgedArtifact(out, reference) as judged:
        table, distinct = judged.table, np.unique(ids)
        truth = reference.fed_logits(ids, table.embeddings(distinct), table.rows(distinct))
        found = np.concatenate(list(judged.graph_logits(ids, 16)))
    np.testing.assert_allclose(found, truth, atol=1e-4)


def test_a_plan_for_less_damage_takes_more_bytes(make_checkpoint: MakeCheckpoint) -> None:
    _, weighed = planner(Checkpoint.open(make_checkpoint(beta=3)))
    found = [
        choose_forms(weighed, lambda options, most=most: fewest_bytes(options, most))
        for most in (1e-2, 1e-3, 1e-4)
    ]
    assert [each.stored for each in found] == sorted(each.stored for each in found)
    for each, most in zip(found, (1e-2, 1e-3, 1e-4), strict=True):
        assert each.damage <= most or each.stored == max(one.stored for one in found)


def test_a_budget_is_kept_and_used(make_checkpoint: MakeCheckpoint) -> None:
    _, weighed = planner(Checkpoint.open(make_checkpoint(beta=3)))
    weights = sum(each.rows * each.columns for each in weighed.values())
    for bits in (2.6, 3.3, 4.7, 6, 8.2):
        budget = int(bits * weights / 8)
        found = choose_forms(weighed, lambda options, most=budget: least_damage(options, most))
        assert 0.9 * budget <= found.stored <= budget


def test_matrices_whose_inputs_are_delicate_get_them_exact() -> None:
    def matrix(inputs: float) -> WeighedForms:
        rounding = {form: 1e-3 * 4.0 ** (4 - form.bits) for form in FORMS}
        return WeighedForms(64, 64, rounding, {32: inputs, 64: 2 * inputs})

    weighed = {f"m{number}": matrix(1e-6) for number in range(8)} | {"odd": matrix(1e-2)}
    found = choose_forms(weighed, lambda options: fewest_bytes(options, 2e-3))
    assert [name for name, each in found.chosen.items() if each.form.level == 0] == ["odd"]
    assert found.damage <= 2e-3


def test_below_four_bits_the_matrices_that_matter_least_have_two(
    make_checkpoint: MakeCheckpoint,
) -> None:
    _, weighed = planner(Checkpoint.open(make_checkpoint(beta=3)))
    weights = sum(each.rows * each.columns for each in weighed.values())
    few = choose_forms(weighed, lambda options: least_damage(options, int(3.5 * weights / 8)))
    bits = {name: each.form.bits for name, each in few.chosen.items()}
    assert 2 in bits.values()
    assert max(bits.values()) > 2

    def dearness(name: str) -> float:
        """Nats that more bits than two take off, for each weight."""
        each = weighed[name]
        return (each.rounding[FORMS[0]] - each.rounding[FORMS[2]]) / (each.rows * each.columns)

    two = [dearness(name) for name in bits if bits[name] == 2]
    more = [dearness(name) for name in bits if bits[name] > 2]
    assert np.median(two) < np.median(more)


@pytest.mark.parametrize("asked", ["auto", "int2", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_on_a_grid_are_kept_bit_for_bit(
    asked: str, tied: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Two kinds on grids of 2 bits, a step for each row, between others that are not."""
    made = make_checkpoint(beta=3, tie_word_embeddings=tied)
    source = Path(shutil.copytree(made, tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("mlp.up_proj.weight", "mlp.gate_proj.weight", "o_proj.weight")):
            steps = weight.float().std(dim=1, keepdim=True).half().float()
            weights[name] = (weight / steps).round().clamp(-2, 1) * steps
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    report = export_model(source, out, graph_weights=asked, verify=False)
    assert "matrices on grids of few bits, kept as they are: 4." in report.notes
    architecture = Checkpoint.open(source).architecture
    found = matrices_of(out)
    for layer in range(2):
        path = f"model.layers.{layer}.mlp"
        whole = [architecture.array(f"{path}.{part}.weight") for part in ("gate_proj", "up_proj")]
        bits, values = found[f"/model/layers.{layer}/mlp/gate_up_proj"]
        np.testing.assert_array_equal(values, np.concatenate(whole))
        assert bits == 4 if asked == "int4" else bits in (2, 4)  # 4 where inputs are not rounded


def test_damage_is_a_sum_with_shares(make_checkpoint: MakeCheckpoint) -> None:
    _, weighed = planner(Checkpoint.open(make_checkpoint()))
    found = choose_forms(weighed, lambda options: fewest_bytes(options, 1e-3))
    assert isinstance(found, Allocation)
    assert sum(found.shares().values()) == pytest.approx(1)


def test_sensitivities_go_into_widened_heads(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint(beta=0, head_dim=12))
    made, weighed = planner(source)
    name = "model.layers.0.self_attn.o_proj.weight"
    found: Sensitivity = made._sensitivities[name]
    idle = np.tile([False] * 6 + [True] * 2, 8)
    np.testing.assert_array_equal(found.moment.diagonal() == 0, idle)
    assert weighed[name].columns == 64


def test_a_network_that_overflows_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(make_checkpoint(beta=0), tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.memory.down_proj.weight"][0] = 3e38  # finite; what it makes is not
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(ExportError, match="logits are not finite on the calibration text"):
        planner(Checkpoint.open(broken))


def test_a_dense_model_takes_the_bits_it_was_given(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(beta=8)
    sizes = []
    for bits in (4.7, 6.5):
        out = tmp_path / str(bits)
        report = export_model(checkpoint, out, table_target=Target(bits=bits), verify=False)
        assert report.manifest.graph.weights == "mixed"
        assert report.matrices is not None
        weights = sum(np.prod(each.shape) for each in graph_weights(checkpoint))
        assert 0.9 * bits <= 8 * report.matrices.stored / weights <= bits
        sizes.append(report.manifest.files["graph.onnx"].bytes)
    assert sizes[0] < sizes[1]


def test_a_dense_model_fits_the_bytes_it_was_given(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, most = make_checkpoint(beta=8), 190_000
    report = export_model(
        checkpoint, tmp_path / "out", table_target=Target(file_bytes=most), verify=False
    )
    files = report.manifest.files
    taken = sum(each.bytes for name, each in files.items() if name.startswith(("graph", "table")))
    assert 0.75 * most <= taken <= most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table_target": Target(bits=2)}, "in their smallest forms they take"),
        ({"table_target": Target(file_bytes=1000)}, "in their smallest forms they take"),
        (
            {"table_target": Target(bits=5), "graph_weights": "int4"},
            "target 5 bits, graph weights int4",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(make_checkpoint(beta=8), tmp_path / "out", verify=False, **options)


def test_a_plan_with_matrices_of_two_bits_is_judged_as_such(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Its rungs leave room for what 2 bits lose on random weights."""
    checkpoint = make_checkpoint(beta=8)
    options: dict[str, Any] = {"accept_quality_loss": True, "overwrite": True}
    for bits, form in ((2.7, "int2"), (6, "mixed")):
        target = Target(bits=bits)
        report = export_model(checkpoint, tmp_path / "out", table_target=target, **options)
        assert report.manifest.graph.weights == "mixed"
        assert len(report.rungs) == 6
        reference = Checkpoint.open(checkpoint).architecture.reference()
        with JudgedArtifact(tmp_path / "out", reference) as judged:
            assert judged.weights == form


def graph_weights(checkpoint: Path) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    form = GraphForm("mixed", get_codec("none"), "float16", method="gptq")
    visit_matrices(Checkpoint.open(checkpoint), form, lambda name, weight: found.append(weight))
    return found


def test_a_promise_that_is_not_kept_is_told(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"accept_quality_loss": True, "overwrite": True}
    monkeypatch.setattr("edge_memllm_export.exporter._PROMISED_INCREASE", 1e9)
    report = export_model(make_checkpoint(beta=8), tmp_path / "out", **options)
    assert not any("the default aims at" in note for note in report.notes)
    monkeypatch.setattr("edge_memllm_export.exporter._PROMISED_INCREASE", -1.0)
    report = export_model(make_checkpoint(beta=8), tmp_path / "out", **options)
    assert "Ask for --graph-weights int8" in report.notes[-1]
    report = export_model(
        make_checkpoint(beta=8), tmp_path / "out", table_target=Target(bits=5), **options
    )
    assert not any("the default aims at" in note for note in report.notes)
