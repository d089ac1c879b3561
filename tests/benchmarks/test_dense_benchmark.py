"""Students, their control and rows beside a frozen model, on tiny networks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.dense import control, retrofit
from benchmarks.dense.__main__ import main
from benchmarks.dense.judging import difference, window_losses
from benchmarks.dense.learning import Plan, Rows, learn
from benchmarks.dense.students import Distilled, Shape, Student, fit
from benchmarks.dense.texts import Windows, cut_windows, read_documents, two_sides
from edge_memllm.modeling.conversion import dense_network
from support.checkpoints import BOS, HIDDEN, LAYERS, MakeCheckpoint, raw_byte_tokenizer

NEURONS = 172  # of the tiny dense network


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Twelve documents of random words."""
    words = ["river", "stone", "light", "was", "the", "of", "a", "slowly", "gone"]
    draw = random.Random(0)
    documents = [
        f"= title {n} =\n" + " ".join(draw.choices(words, k=600)) + "\n" for n in range(12)
    ]
    path = tmp_path / "text.txt"
    path.write_text("".join(documents), "utf-8")
    return path


def test_no_document_is_on_both_sides_and_windows_begin_with_the_boundary(text: Path) -> None:
    documents = read_documents(text, 32)
    assert len(documents) == 12
    assert read_documents(text, 4000) == []
    assert len(read_documents(text, 32, 5)) == 5
    assert not any("title" in each for each in documents)
    learned, held_out = two_sides(documents)
    assert (len(learned), len(held_out)) == (9, 3)
    windows = cut_windows(held_out, raw_byte_tokenizer(), BOS, 32, 9)
    assert windows.ids.shape == (9, 32)
    assert (windows.ids[:, 0] == BOS).all()
    assert windows.document.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert windows.documents == 3
    moved = cut_windows(held_out, raw_byte_tokenizer(), BOS, 32, 9, 0.5)
    assert not torch.equal(moved.ids, windows.ids)


def test_an_error_counts_documents_and_not_windows() -> None:
    """Ten windows of one document are one observation: its difference is not known better."""
    gaps = [0.1] * 10 + [-0.1] * 10
    together = difference(gaps, [0.0] * 20, [0] * 10 + [1] * 10)
    apart = difference(gaps, [0.0] * 20, list(range(20)))
    assert together.documents == 2
    assert together.low == pytest.approx(-0.1)
    assert together.high == pytest.approx(0.1)
    assert -0.06 < apart.low < 0 < apart.high < 0.06


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(97, 122, (count, 24), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = BOS
    return drawn


def test_rows_start_at_zero_and_are_added_behind_their_layers(
    make_checkpoint: MakeCheckpoint,
) -> None:
    network, ids = dense_network(make_checkpoint(beta=8)), ids_of(2)
    rows = Rows(network, ids.unique())
    before = network(input_ids=ids, use_cache=False).logits

    def logits() -> torch.Tensor:
        rows.prepare(ids)
        with rows.inside():
            found: torch.Tensor = network(input_ids=ids, use_cache=False).logits
        return found

    assert torch.equal(logits(), before)
    rows.weight[:, LAYERS - 1] = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(logits(), before)
    rows.layers = {0}
    assert torch.equal(logits(), before)
    assert torch.equal(network(input_ids=ids, use_cache=False).logits, before)


def test_only_rows_of_tokens_that_were_read_learn(make_checkpoint: MakeCheckpoint) -> None:
    network, ids = dense_network(make_checkpoint(beta=8)), ids_of(4)
    learner = retrofit.RowLearner(network, torch.arange(90, 130))
    losses = [learner.step(ids, 0.05) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    weight = learner.rows.weight
    read = learner.rows.place[ids].unique()
    assert weight[read].abs().amax(dim=(1, 2)).min() > 0
    rest = torch.ones(len(weight), dtype=torch.bool)
    rest[read] = False
    assert not weight[rest].any()


def test_lora_starts_as_nothing_and_learns_beside_frozen_weights(
    make_checkpoint: MakeCheckpoint,
) -> None:
    path, ids = make_checkpoint(beta=8), ids_of(4)
    plain = dense_network(path)
    network = dense_network(path)
    learner = retrofit.LowRankLearner(network, 4)
    assert torch.equal(learner.logits(ids), plain(input_ids=ids, use_cache=False).logits)
    losses = [learner.step(ids, 0.01) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    frozen = network.model.layers[0].mlp.up_proj.frozen.weight
    assert torch.equal(frozen, plain.model.layers[0].mlp.up_proj.weight)


def test_learning_goes_on_where_it_stopped(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path, ids = make_checkpoint(beta=8), ids_of(8)

    def learner() -> retrofit.RowLearner:
        return retrofit.RowLearner(dense_network(path), ids.unique())

    plan = Plan(6, 2, 0.01, save_every=2)
    whole = learn(learner(), ids, plan, tmp_path / "whole")
    first = learn(learner(), ids, plan, tmp_path / "parts", until=3)
    assert first == whole[:3]
    assert learn(learner(), ids, plan, tmp_path / "parts") == whole


def student_of(path: Path, rows: int, width: int, ids: torch.Tensor) -> Student:
    shape = Shape([width] * LAYERS, rows)
    return Student(dense_network(path).requires_grad_(True), shape, ids)


def test_a_student_of_all_neurons_is_the_dense_network(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(beta=8)
    teacher, ids = dense_network(path), ids_of(16)
    width = teacher.config.intermediate_size
    for rows in (0, 20):
        student = student_of(path, rows, width, ids)
        fit(student, teacher, ids)
        wanted = teacher(input_ids=ids, use_cache=False).logits
        assert torch.allclose(student.logits(ids), wanted, atol=0.1)


def test_rows_make_up_for_neurons_that_the_control_lacks(make_checkpoint: MakeCheckpoint) -> None:
    """Of a network whose tokens decide nearly everything, rows give back more than nothing."""
    path, ids, other = make_checkpoint(beta=8), ids_of(48), ids_of(8, seed=1)
    teacher = dense_network(path)
    wanted = teacher(input_ids=other, use_cache=False).logits
    missed = []
    for rows in (0, 30):
        student = student_of(path, rows, 8, ids)
        fit(student, teacher, ids)
        missed.append((student.logits(other) - wanted).square().mean().item())
    assert missed[1] < 0.8 * missed[0]


def test_distillation_brings_a_student_nearer(make_checkpoint: MakeCheckpoint) -> None:
    path, ids = make_checkpoint(beta=8), ids_of(16)
    teacher = dense_network(path)
    student = student_of(path, 20, 16, ids)
    fit(student, teacher, ids)
    learner = Distilled(student, teacher)
    losses = [learner.step(ids[:8], 1e-3) for _ in range(10)]
    assert losses[-1] < losses[0]


def run(name: str, model: Path, text: Path, folder: Path, *settings: str) -> dict[str, Any]:
    out = folder / f"{name}.json"
    words = [name, str(model), "--text", str(text), "--runs", str(folder / name)]
    words += ["--out", str(out), *(f"--set={each}" for each in settings)]
    assert main(words) == 0
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


def test_both_commands_measure_and_go_on(
    make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(beta=8)
    small = ("learned=16", "held_out=6", "length=24", "batch=4")
    found = run("control", model, text, tmp_path, *small, "fitted=8", "rows=20")
    assert found["tokens"] == 4 * 4 * 24
    assert set(found["distilled"]) == {"control", "rows", "rows against control"}
    assert found["dense"]["difference"]["mean"] == 0
    assert found["parameters"]["control"] == found["parameters"]["rows"]
    added = run("retrofit", model, text, tmp_path, *small, "tuning=4")
    assert added["base"]["against_nothing"]["mean"] == 0
    assert {"all", "first token alone", "last third"} < set(added["rows"])
    assert {"all", "last third"} < set(added["lora"])
    assert set(added["rows_against_lora"]) == {"all", "chosen elsewhere"}
    # What was done is not done again.
    monkeypatch.setattr(control, "learn", None)
    monkeypatch.setattr(retrofit, "learn", None)
    assert run("control", model, text, tmp_path, *small, "fitted=8", "rows=20") == found
    assert run("retrofit", model, text, tmp_path, *small, "tuning=4") == added
    out = tmp_path / "rows.json"
    words = ["retrofit", str(model), "--text", str(text), "--runs", str(tmp_path / "retrofit")]
    words += [f"--set={each}" for each in (*small, "tuning=4")]
    assert main([*words, "--only", "rows", "--out", str(out)]) == 0
    alone = json.loads(out.read_text("utf-8"))
    assert alone["rows"] == added["rows"]
    assert "lora" not in alone


def test_a_field_that_is_none_is_named(tmp_path: Path) -> None:
    words = ["control", "model", "--text", "a", "--runs", str(tmp_path), "--set", "size=3"]
    with pytest.raises(SystemExit, match="no such field; there are learned, fitted"):
        main(words)


def test_losses_are_those_of_the_network(make_checkpoint: MakeCheckpoint, text: Path) -> None:
    network = dense_network(make_checkpoint(beta=8))
    documents = read_documents(text, 32)
    windows = cut_windows(documents, raw_byte_tokenizer(), BOS, 16, 12)
    found = window_losses(lambda ids: network(input_ids=ids, use_cache=False).logits, windows)
    logits = network(input_ids=windows.ids[3:4], use_cache=False).logits[0, :-1]
    wanted = -logits.log_softmax(-1)[torch.arange(15), windows.ids[3, 1:]].mean()
    assert float(found[3]) == pytest.approx(float(wanted), abs=1e-5)


def test_layers_that_are_left_out_add_nothing(make_checkpoint: MakeCheckpoint) -> None:
    path, ids = make_checkpoint(beta=8), ids_of(4)
    plain = dense_network(path)(input_ids=ids, use_cache=False).logits
    for learner in (
        retrofit.RowLearner(dense_network(path), ids.unique()),
        retrofit.LowRankLearner(dense_network(path), 4),
    ):
        for _ in range(3):
            learner.step(ids, 0.05)
        learned = learner.logits(ids)
        learner.keep([])
        assert torch.equal(learner.logits(ids), plain)
        learner.keep([0])
        assert not torch.allclose(learner.logits(ids), learned)
        learner.keep(range(LAYERS))
        assert torch.equal(learner.logits(ids), learned)


def test_what_is_chosen_for_a_document_is_not_chosen_by_it(tmp_path: Path) -> None:
    windows = Windows(torch.zeros(4, 2, dtype=torch.long), torch.tensor([0, 0, 1, 1]))
    bench = retrofit._Bench(
        tmp_path, retrofit._Sides(windows, windows, windows), tmp_path, retrofit.Size()
    )
    losses = {name: [3.0] * 4 for name in (retrofit.WHOLE, *retrofit.THIRDS)}
    losses["last third"] = [1.0, 1.0, 4.0, 4.0]
    assert bench._chosen(losses) == [3.0, 3.0, 4.0, 4.0]
