"""The measurement of suppression runs, and its figures are means over the words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import suppression
from support.checkpoints import MakeArtifact, MakeCheckpoint


def test_it_measures_the_variants(
    make_checkpoint: MakeCheckpoint,
    make_artifact: MakeArtifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("a o a\nnothing here\n" * 3, encoding="utf-8")
    few = ("tokens", "tokens, shortest change", "rows, by corpus", "keys, 50 by corpus")
    fewer = [variant for variant in suppression.VARIANTS if variant.name in few]
    monkeypatch.setattr(suppression, "VARIANTS", fewer)
    artifact = make_artifact(graph_weights="fp32", table_codec="f32", beta=1)
    words = ["a.py", str(make_checkpoint(beta=1)), str(artifact), "--words", "o", "a"]
    words += ["--corpus", str(text), "--text", str(text), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    suppression.main()
    shown = capsys.readouterr().out
    stored = json.loads(out.read_text())
    assert set(stored["words"]) == {"o", "a"}
    names = {variant.name for variant in fewer} | {
        "control: other rows",
        "control: other directions",
    }
    assert set(stored["summary"]) == names
    assert all(name in shown for name in names)
    changes = [
        each["tokens"]["after"]["log_probability"] - each["tokens"]["before"]["log_probability"]
        for each in stored["words"].values()
    ]
    assert stored["summary"]["tokens"]["log_probability"] == pytest.approx(sum(changes) / 2)


def test_half_of_the_excerpt_has_the_words() -> None:
    text = "the king\nno\n\nwar and king\nhis war\na war\n" + "else\n" * 9
    assert suppression.excerpts([text, text], ["king", "war"], 40) == "\n".join(
        ["the king", "no", "war and king", "else", "else"] * 2
    )
