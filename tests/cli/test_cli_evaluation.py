"""eval, from the command line to its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm.cli.main import main
from support import HARNESS
from support.checkpoints import CONTEXT, MakeArtifact


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    """``report(*words)``: the JSON of a command that succeeds."""

    def call(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["eval", *map(str, words), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    return call


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("Something else.", encoding="utf-8")
    return path


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that fails, and prints nothing else."""
    capsys.readouterr()
    assert main(["eval", *map(str, words)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def shown_by(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["eval", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_several_texts(artifact: Path, text: Path, other: Path, report: Any) -> None:
    found = report(artifact, "--text", text, other, "--context", 64, "--stride", 16)
    alone = report(artifact, "--text", other, "--context", 64, "--stride", 16)
    assert found["tasks"] == found["groups"] == {}
    assert found["texts"][str(other)]["nll_per_token"] == pytest.approx(alone["nll_per_token"])
    for figure in ("tokens", "bytes", "words", "nll"):
        total = sum(part[figure] for part in found["texts"].values())
        assert found[figure] == pytest.approx(total)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_per_token"]))
    assert found["word_perplexity"] == pytest.approx(math.exp(found["nll"] / found["words"]))
    assert (found["context"], found["stride"]) == (64, 16)


def test_against_a_reference(
    artifact: Path, text: Path, other: Path, report: Any, make_artifact: MakeArtifact
) -> None:
    reference = make_artifact(graph_weights="fp32", table_codec="f32")
    found = report(artifact, "--text", text, other, "--reference", reference)
    alone = report(reference, "--text", text, other)
    divergence = found["divergence"]
    assert divergence["reference_perplexity"] == pytest.approx(alone["perplexity"])
    assert 0 < divergence["median_kl"] <= divergence["p99_kl"] <= divergence["max_kl"]
    assert 0.3 < divergence["top1_agreement"] <= 1
    assert divergence["tokens"] == found["tokens"]
    assert found["texts"][str(other)]["divergence"]["tokens"] == 15
    own = report(artifact, "--text", other, "--reference", artifact)["divergence"]
    assert own["max_kl"] == own["perplexity_increase"] == 0


def test_the_reference_is_read_in_full(
    artifact: Path, text: Path, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    load = edge_memllm.load

    def noting(path: Path, **keywords: Any) -> edge_memllm.Model:
        asked.append(keywords.pop("table_quality"))
        return load(path, **keywords)

    monkeypatch.setattr(edge_memllm, "load", noting)
    report(artifact, "--text", text, "--reference", artifact, "--table-quality", "coarse")
    assert asked == ["coarse", "full"]


def test_tasks(artifact: Path, report: Any) -> None:
    found = report(artifact, "--task", HARNESS, "--limit", 3)
    assert found["perplexity"] is found["nll_per_token"] is None
    assert found["tokens"] == 0
    assert set(found["tasks"]) == {
        f"harness/{name}" for name in ("choices", "contexts", "continuation", "pairs")
    }
    choices = found["tasks"]["harness/choices"]
    assert choices["items"] == 3
    assert {"acc", "acc_stderr", "acc_norm", "acc_bytes", "kind", "truncated"} <= set(choices)
    mean = sum(task["acc"] for task in found["tasks"].values()) / 4
    assert found["groups"]["harness"]["acc"] == pytest.approx(mean)
    assert found["groups"]["harness"]["items"] == 12
    again = report(artifact, "--task", HARNESS, "--limit", 3)
    assert again == found


def test_the_delimiter_reaches_the_items(artifact: Path, report: Any) -> None:
    path = HARNESS / "continuation.jsonl"
    plain, asked = (
        report(artifact, "--task", path, *words)["tasks"]["continuation"]
        for words in ((), ("--delimiter", "\\nAnswer: "))
    )
    assert plain["perplexity"] != asked["perplexity"]


def test_for_people(
    artifact: Path, text: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = shown_by(capsys, artifact, "--text", text, other, "--reference", artifact)
    assert "bits per byte" in shown
    assert "\nall " in shown
    assert f"windows of {CONTEXT} tokens, every {CONTEXT // 2}" in shown
    assert "100.00%" in shown
    assert "+0.00%" in shown
    assert "task" not in shown


def test_tasks_for_people(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = shown_by(capsys, artifact, "--task", HARNESS)
    assert "harness/pairs" in shown
    assert "mean of harness" in shown
    assert "±" in shown
    assert "text" not in shown.splitlines()[0]
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"context": "x" * 600, "continuation": "y"}))
    assert "1 contexts were longer than the model's" in shown_by(capsys, artifact, "--task", long)


def test_what_is_no_text(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(b"abc\xff")
    message = failing(capsys, artifact, "--text", tmp_path / "image")
    assert "byte 3 is not UTF-8 text" in message
    assert "No such file" in failing(capsys, artifact, "--text", tmp_path / "none")
    assert "No such file" in failing(capsys, artifact, "--task", tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "There is nothing to measure. Give --text FILE or --task FILE"),
        (("--task", HARNESS, "--context", 9), "--context has no effect without --text"),
        (("--task", HARNESS, "--stride", 9), "--stride has no effect without --text"),
        (("--task", HARNESS, "--reference", "a"), "--reference has no effect without --text"),
        (("--text", __file__, "--limit", 9), "--limit has no effect without --task"),
        (("--text", __file__, "--delimiter", ""), "--delimiter has no effect without --task"),
    ],
)
def test_an_option_without_effect_is_refused(
    artifact: Path, words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failing(capsys, artifact, *words)
