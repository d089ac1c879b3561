"""suppress, from the command line to an overlay that does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm.cli.main import main
from edge_memllm.overlays import open_overlay
from support.checkpoints import MakeArtifact, MakeCheckpoint
from support.small_model import byte_tokenizer


@pytest.fixture
def artifact(make_artifact: MakeArtifact) -> Path:
    return make_artifact(graph_weights="fp32", table_codec="f16", beta=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("An owl and a fox. " * 3, encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "calm.overlay.safetensors"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    code = main(["suppress", *map(str, words), "--threads", "1"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def test_the_overlay_turns_the_words_down(
    artifact: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = json.loads(
        run(capsys, artifact, "--words", "o", "--most", 60, "--out", out, "--text", text, "--json")
    )
    overlay = open_overlay(out)
    assert found["overlay"]["name"] == overlay.name == "calm"
    assert found["overlay"]["bytes"] == out.stat().st_size
    assert overlay.spec.description == "'o' turned down by tokens, strength 1"
    assert [each["token"]["text"] for each in found["words"]["taken"]] == ["o"]
    assert found["rows"] == found["parts"] == len(overlay) == len(found["changed"])
    assert abs(found["promotion_after"]) < 0.01 < found["promotion_before"]
    effect = found["effects"]["suppression"]
    assert effect["after"]["mass"] < effect["before"]["mass"]
    assert set(found["effects"]) == {"suppression", "other_rows", "other_directions"}
    with edge_memllm.load(artifact, device="cpu", threads=1, overlays=[out]) as model:
        changed = model.source.rows(np.arange(256))
    with edge_memllm.load(artifact, device="cpu", threads=1) as model:
        different = (changed != model.source.rows(np.arange(256))).any(axis=2)
    touched = {(edit.token, edit.layer) for edit in overlay.edits()}
    assert {(int(token), int(layer)) for token, layer in np.argwhere(different)} <= touched
    assert different.any()


def test_what_is_shown(
    artifact: Path, text: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(capsys, artifact, "--words", "o", "--most", 9, "--out", out, "--text", text)
    for line in (
        "words      'o' (#",
        "left out   ' ' (#",
        "found      9 tokens that promote them",
        "changed    9 rows, layer 1",
        " 0.00 after, mean of a token",
        "promoted most by  layer  before  after",
        "probability, where they came",
        "KL of all else, nats",
        "54 tokens, 6 of them the words'.",
    ):
        assert line in shown
    assert "-0.00" not in shown


@pytest.mark.parametrize("by", ["tokens", "rows", "keys"])
def test_strength_zero_writes_an_overlay_that_changes_nothing(
    by: str, out: Path, make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (make_checkpoint(beta=1), "--words", "o", "--by", by, "--strength", 0, "--out", out)
    assert "which changes nothing" in run(capsys, *words)
    assert len(open_overlay(out)) == 0


def test_keys_and_layers_of_a_checkpoint(
    out: Path, text: Path, make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--words", "o", "a", "--by", "keys", "--most", 5, "--layers", 1, "--name", "less")
    checkpoint = make_checkpoint(beta=1)
    shown = run(capsys, checkpoint, *words, "--corpus", text, "--out", out)
    assert "5 keys of rows" in shown
    overlay = open_overlay(out)
    assert overlay.name == "less"
    assert {edit.layer for edit in overlay.edits()} == {1}
    assert {edit.token for edit in overlay.edits()} <= set(
        byte_tokenizer().encode(text.read_text())
    )


def test_a_text_without_the_words_says_so(
    artifact: Path, out: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(capsys, artifact, "--words", "Z", "--most", 5, "--out", out, "--text", text)
    assert "none of them the words'" in shown
    assert "where they came" not in shown


def test_pieces_are_taken_when_asked_for(
    artifact: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(capsys, artifact, "--words", "owl", "--pieces", "--most", 3, "--out", out)
    assert "'o' (#" in shown
    assert "the first piece of 'owl'" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--words", "owl"), "'owl' is not one token"),
        (("--words", "o", "--by", "keys"), "An artifact has no keys"),
        (("--words", "o", "--strength", "11"), r"strength is 11, expected 0 (nothing) to 10"),
        (("--words", "o", "--layers", "7"), "layer 7 has no memory of its own"),
        (("--words", "o", "--seed", "1"), "--seed has no effect without --text"),
        (("--words", "o", "--context", "8"), "--context has no effect without --text"),
        (("--words", "o", "--name", "a b"), "The name of an overlay is 'a b'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    words: tuple[str, ...],
    message: str,
    artifact: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["suppress", str(artifact), *words, "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert list(out.parent.glob("*overlay*")) == []


def test_a_file_that_is_there_is_kept_unless_forced(
    artifact: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.write_bytes(b"precious")
    words = [str(artifact), "--words", "o", "--most", "3", "--out", str(out), "--threads", "1"]
    assert main(["suppress", *words]) == 1
    assert "there is a file already" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert main(["suppress", *words, "--force"]) == 0
    assert len(open_overlay(out)) == 3
    assert main(["suppress", *words[:-4], "--out", str(out.with_name("other.bin"))]) == 1
    assert "expected a name that ends in '.overlay.safetensors'" in capsys.readouterr().err
