"""Trained runs become stored figures, each measured once; scaled checkpoints; what a run is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file

import benchmarks.paper.page as page
from benchmarks.paper import judging, training
from benchmarks.paper.judging import Judge, TaskUse
from benchmarks.paper.measure import measure_runs
from benchmarks.paper.runs import changes, read_runs, scaled_compute
from benchmarks.paper.store import Results
from benchmarks.paper.sweeps import rank_section
from benchmarks.paper.texts import write_texts
from edge_memllm.modeling import MemoryLLMConfig, parameter_counts
from edge_memllm.modeling.recipe import Recipe
from edge_memllm.modeling.training import model_config
from support.checkpoints import MakeCheckpoint
from support.documents import parses

WORDS = "The cat sat on the mat and looked at the dog. "


@pytest.fixture
def runs(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    """Two finished runs, and one that is not."""
    folder = tmp_path / "runs"
    for name, beta in (("memoryllm-s1", 0), ("base-s1", 8)):
        shutil.copytree(make_checkpoint(beta=beta, num_hidden_layers=3), folder / name)
        history = [{"step": s, "tokens": s * 10**6, "loss": 5.0 - s / 10} for s in (1, 2, 3)]
        record = {
            "recipe": {
                "data": {"sequence_length": 32},
                "training": {"steps": 3, "warmup_steps": 1},
            },
            "history": [*history, {"step": 3, "tokens": 3 * 10**6, "valid_loss": 4.5}],
            "tokens_seen": 3 * 10**6,
            "valid_loss": 4.5,
        }
        (folder / name / "training.json").write_text(json.dumps(record))
    (folder / "flex-3-s1" / "checkpoints").mkdir(parents=True)
    return folder


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    data = tmp_path / "data"
    for number, name in enumerate(judging.TEXTS.values(), 1):
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text(WORDS * number)
    rows = [{"query": "The cat", "choices": [" sat", " ran"], "gold": 0}] * 4
    (data / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = {"context": "The cat sat on the", "continuation": "mat"}
    (data / "words.jsonl").write_text(f"{json.dumps(last)}\n" * 3)
    (data / "folder").mkdir()
    shutil.copy(data / "choices.jsonl", data / "folder")
    uses = {"LAMBADA": TaskUse("words.jsonl", 2), "BLiMP": TaskUse("folder", 2)}
    uses |= {name: TaskUse("choices.jsonl", 3) for name in ("ARC-Easy", "Winogrande", "PIQA")}
    monkeypatch.setattr(judging, "TASKS", uses)
    return Judge(data)


def test_runs_become_figures_once_and_figures_a_page(
    runs: Path, judge: Judge, tmp_path: Path
) -> None:
    stored = tmp_path / "stored"
    only = ("perplexity", "drop", "bits")
    done = list(measure_runs(runs, judge, only, stored))
    assert [line.partition(",")[0] for line in done] == [
        "perplexity: base-s1",
        "perplexity: memoryllm-s1",
        "drop: base-s1",
        "drop: memoryllm-s1",
        "bits: memoryllm-s1",
    ]
    assert list(measure_runs(runs, judge, only, stored)) == []
    text, *pictures = page.page_files(stored).values()
    assert "| 1 | " in text
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(picture)
    (runs / "base-s1" / "config.json").write_text(
        (runs / "base-s1" / "config.json").read_text() + "\n"
    )
    again = list(measure_runs(runs, judge, ("perplexity",), stored))
    assert [line.partition(",")[0] for line in again] == ["perplexity: base-s1"]


def test_gains_and_ranks_become_figures(
    runs: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.paper.measure.GAINS", (1.0, 0.5))
    list(measure_runs(runs, judge, ("gain", "rank"), tmp_path))
    found = Results("gain", tmp_path).all()["base-s1"]["figures"]["gains"]
    assert [each["gain"] for each in found] == [1.0, 0.5]
    assert found[0]["texts"] != found[1]["texts"]
    assert found[0]["tasks"]["BLiMP"]["items"] == 2
    rank = Results("rank", tmp_path).all()["memoryllm-s1"]["figures"]
    assert [cut["rank"] for cut in rank["cuts"]] == [64, 58, 51, 45, 38, 32]
    assert all(layer[0] == 1 for layer in rank["singular_values"])
    assert "Half of the rank" in rank_section(Results("rank", tmp_path).all()).claims[0].paper


def test_unfinished_and_unnamed_folders_are_no_runs(runs: Path) -> None:
    (runs / "notes").mkdir()
    assert [run.name for run in read_runs(runs)] == ["base-s1", "memoryllm-s1"]


def test_factors_of_one_change_nothing_and_zero_takes_a_layer_out(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = make_checkpoint(beta=3)
    plain = load_file(checkpoint / "model.safetensors")
    with scaled_compute(checkpoint, [1.0, 0.0]) as changed:
        weights = load_file(changed / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert not weights[name].any()
    assert all(np.array_equal(plain[each], weights[each]) for each in plain if each != name)
    assert not changed.exists()


def test_changes_are_told_by_the_configuration() -> None:
    assert changes(MemoryLLMConfig(beta=3)) == []
    wide = 2 * MemoryLLMConfig(beta=0).memory_intermediate_size
    assert changes(MemoryLLMConfig(beta=0, memory_intermediate_size=wide)) == [
        "FFN-M 2 times as wide"
    ]
    both = MemoryLLMConfig(beta=3, memory_norm="shared", memory_source="both")
    assert changes(both) == ["one memory norm for all layers", "FFN(x_0) and a free table, summed"]


def test_trainings_are_made_go_on_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def ran(words: list[str], **_: Any) -> None:
        called.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "model.safetensors").touch()

    monkeypatch.setattr(training.subprocess, "run", ran)
    runs, length = tmp_path / "runs", training.Length(2100)
    (runs / "flex-3-long-s1" / "checkpoints" / "checkpoint-100").mkdir(parents=True)
    told = list(training.train_runs(runs, tmp_path, length, variants=("base", "flex-3")))
    assert told == ["base-long-s1: trained", "flex-3-long-s1: trained"]
    first, second = called
    assert "--resume" not in first
    assert "--resume" in second
    assert "training.steps=2100" in first
    again = list(training.train_runs(runs, tmp_path, length, variants=("base", "flex-3")))
    assert again == ["base-long-s1: finished", "flex-3-long-s1: finished"]
    assert len(called) == 2
    words = training.training_words("base", 2, runs / "base-s2", tmp_path, training.Length())
    assert parses(words[3:])
    assert not any("steps" in word for word in words)


def test_narrow_trainings_are_of_all_models_at_one_budget(tmp_path: Path) -> None:
    length = training.Length(narrow=True)
    counts = {}
    for variant in length.variants:
        words = training.training_words(variant, 1, tmp_path / "runs" / variant, tmp_path, length)
        assert parses(words[3:])
        recipe = Recipe.load(Path(words[4]))
        for place, word in enumerate(words):
            if word == "--set":
                recipe.override(words[place + 1])
        counts[variant] = parameter_counts(model_config(recipe))
    assert len({recipe.training.steps for _ in counts}) == 1
    assert counts["attention-only"]["total"] == counts["memoryllm"]["active"]
    for variant in ("flex-3", "flex-2", "flex-1", "memoryllm"):
        assert counts[variant]["total"] == pytest.approx(counts["base"]["total"], rel=0.02)
    for dense, sparse in (("base-active", "memoryllm"), ("base-active-flex-3", "flex-3")):
        active = counts[sparse]["active"]
        assert counts[dense]["total"] == pytest.approx(active, rel=0.01)


def test_narrow_runs_are_judged_by_documents_and_others_are_not(
    runs: Path, judge: Judge, tmp_path: Path
) -> None:
    for name in judging.TRAINED:
        path = judge.data / judging.TEXTS[name]
        path.write_text(f"= one =\n{WORDS}\n= two =\n{WORDS * 2}\n")
    (runs / "base-s1").rename(runs / "base-narrow-s1")
    done = list(measure_runs(runs, judge, ("perplexity", "documents"), tmp_path))
    assert [line.partition(",")[0] for line in done] == [
        "perplexity: memoryllm-s1",
        "documents: base-narrow-s1",
    ]
    found = Results("documents", tmp_path).all()["base-narrow-s1"]["figures"]["documents"]
    assert [len(found["novels"][name]) for name in ("nll", "tokens")] == [2, 2]
    text = page.page_files(tmp_path)[page.PAGE]
    assert "| attention only | - | - | - | not measured |" in text


def test_novels_are_held_out_whole_and_sides_share_none(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name, count in (("Wikipedia", 8), ("novels", 9)):
        for side in ("train", "valid"):
            path = (data / judging.TEXTS[name]).with_name(f"{side}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"= {side} {n} =\n{WORDS}\n" for n in range(count)))
    told = list(write_texts(data, out))
    assert [line.partition(" documents")[0] for line in told] == [
        "enwiki-slice/train.txt: 2",
        "enwiki-slice/valid.txt: 8",
        "eltec-eng/train.txt: 7",
        "eltec-eng/valid.txt: 11",
    ]
    novels = out / judging.TEXTS["novels"]
    learned, judged = (
        {text.splitlines()[0] for text in judging.titled_documents(path)}
        for path in (novels.with_name("train.txt"), novels)
    )
    assert "= train 3 =" in judged
    assert not learned & judged
