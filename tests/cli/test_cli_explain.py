"""``edge-memllm explain`` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.cli.analysis.explain import page, shown
from edge_memllm.cli.main import main
from edge_memllm.interpretation.findings import Explanation, ModelFacts, Sentence, Token
from edge_memllm.text.token_texts import TokenTexts
from support.checkpoints import BOS, LAYERS, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.small_model import byte_tokenizer

TEXT = "The sea."


def explained(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["explain", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["explain", *map(str, words)]) == 1
    return capsys.readouterr().err


def shown_seven() -> str:
    return TokenTexts(byte_tokenizer(), VOCABULARY).text(7)


def test_a_checkpoint_answers_everything(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(
        capsys,
        *(make_checkpoint(beta=2), "--text", TEXT, "--text", "Oh", "--token", "a", "--token", "#7"),
        *("--token", "a", "--key", "1:3", "--similar", "b", "--keys", 2, "--count", 3),
    )
    assert found["model"]["source"] == "checkpoint"
    assert found["model"]["keys"] == 128
    assert found["model"]["identity"].startswith("sha256:")
    assert [sentence["text"] for sentence in found["sentences"]] == [TEXT, "Oh"]
    assert [card["token"]["text"] for card in found["tokens"]] == ["a", shown_seven()]
    use = found["tokens"][0]["layers"][0]
    assert len(use["keys"]) == 2
    assert len(use["promotes"]) == len(use["keys"][0]["card"]["promotes"]) == 3
    assert [(card["layer"], card["key"]) for card in found["keys"]] == [(1, 3)]
    assert [each["layer"] for each in found["similar"]] == [*range(LAYERS), None]
    direct = found["sentences"][0]["direct"]
    parts = (direct["attention"], direct["compute"], direct["memory"])
    total = direct["embedding"] + sum(np.array(part).sum(axis=1) for part in parts)
    np.testing.assert_allclose(total, direct["logit"], atol=1e-3)


def test_an_artifact_answers_what_needs_no_weights(
    make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(
        capsys, make_artifact(), "--text", TEXT, "--token", "a", "--similar", "a", "--layers", "1"
    )
    assert found["model"]["source"] == "artifact"
    assert found["model"]["keys"] is None
    assert found["sentences"][0]["direct"] is None
    assert [use["layer"] for use in found["tokens"][0]["layers"]] == [1]
    assert found["tokens"][0]["layers"][0]["keys"] == []
    assert found["similar"][0]["features"] == "rows"


def test_an_artifact_needs_no_torch(
    make_artifact: MakeArtifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_checkpoint: MakeCheckpoint,
) -> None:
    artifact, checkpoint = make_artifact(), make_checkpoint()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert explained(capsys, artifact, "--text", TEXT)["sentences"]
    assert "pip install '.[export]'" in refused(capsys, checkpoint, "--text", TEXT)


def test_the_terminal_shows_tokens_keys_and_texts(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(beta=1)
    words = ["--text", TEXT, "--token", "a", "--key", "0:1", "--similar", "a", "--count", "2"]
    assert main(["explain", str(checkpoint), *words]) == 0
    out = capsys.readouterr().out
    assert "checkpoint, 2 layers of width 64, a memory of 149 keys each, 300 tokens" in out
    assert "token 'a' #" in out
    assert "key 0:1\n  fired by    '" in out
    assert "like 'a' #" in out
    (head,) = (line for line in out.splitlines() if line.startswith("token  "))
    columns = ["token", "p", "without", "effect", "layer", "0", "layer", "1", "|"]
    assert head.split() == [*columns, "logit", "embedding", "attention", "FFN-C", "memory"]
    assert "The last token is the model's own guess." in out


def test_a_key_below_zero_is_shown_as_it_works(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(capsys, make_checkpoint(), "--token", "a", "--keys", 30)
    uses = [key for use in found["tokens"][0]["layers"] for key in use["keys"]]
    below = next(use for use in uses if use["coefficient"] < 0)
    assert main(["explain", str(make_checkpoint()), "--token", "a", "--keys", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    card = below["card"]
    at = next(
        place
        for place, line in enumerate(lines)
        if line.startswith(f"    key {card['layer']}:{card['key']} ")
    )
    for offset, name, source in (
        (1, "fired by", "inverts"),
        (2, "promotes", "suppresses"),
        (3, "suppresses", "promotes"),
    ):
        texts = " ".join(shown(each["token"]["text"]) for each in card[source])
        assert lines[at + offset].strip() == f"{name:<11} {texts}"


def test_a_page_is_written_once(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["explain", str(make_artifact()), "--text", TEXT, "--html", str(out)]) == 0
    assert f"page: {out}" in capsys.readouterr().out
    assert out.read_text("utf-8").lower().startswith("<!doctype html>")
    again = ["--text", TEXT, "--html", out]
    assert "is there already. Choose another name" in refused(capsys, make_artifact(), *again)
    assert explained(capsys, make_artifact(), *again, "--overwrite")["sentences"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "There is nothing to explain. Ask for a text"),
        (("--key", "0:1"), "An artifact has no keys: its table holds their sums"),
        (("--token", "sea"), "'sea' is several tokens"),
        (("--token", "a", "--layers", "2"), "layer 2 has no memory of its own"),
        (("--text", "a", "--layers", "0"), "--layers has no effect without --token or --similar"),
        (("--text", "a", "--cluster-count", "3"), "--cluster-count has no effect without"),
        (("--text", "a", "--corpus", "x.txt"), "--corpus has no effect without --clusters or"),
        (("--text", "a", "--limit", "3"), "--limit has no effect without --task"),
        (("--text", "a", "--keys", "3"), "--keys has no effect without --token"),
        (("--text", "a", "--seed", "0"), "--seed has no effect without --clusters or"),
        (("--text", "a", "--overwrite"), "--overwrite has no effect without --html"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...],
    message: str,
    make_artifact: MakeArtifact,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(capsys, make_artifact(), *words)


def test_rows_that_no_network_makes_have_no_keys_to_show(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(memory_source="table")
    assert "no FFN-M makes its rows" in refused(capsys, checkpoint, "--key", "0:1")
    assert explained(capsys, checkpoint, "--token", "a")["tokens"]


@pytest.mark.parametrize("words", [["--key", "3"], ["--key", "a:b"], ["--layers", "0,x"]])
def test_wrong_usage_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "model", *words]) == 2
    assert "such as 0" in capsys.readouterr().err


def test_what_has_no_memory_or_is_no_model_is_refused(
    make_checkpoint: MakeCheckpoint,
    make_artifact: MakeArtifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for dense in (make_checkpoint(beta=8), make_artifact(beta=8)):
        assert "no token memory (dense): there is none" in refused(capsys, dense, "--text", TEXT)
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", "--text", TEXT)
    silent = Path(shutil.copytree(make_checkpoint(), tmp_path / "silent"))
    (silent / "tokenizer.json").unlink()
    assert "no tokenizer.json, so tokens have no text" in refused(capsys, silent, "--text", TEXT)


def test_one_memory_for_all_layers_is_one_layer(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(memory_sharing="all_layers")
    found = explained(capsys, checkpoint, "--token", "a", "--text", TEXT)
    assert [use["layer"] for use in found["tokens"][0]["layers"]] == [0]
    assert len(found["sentences"][0]["without_layer"][0]) == LAYERS
    assert main(["explain", str(checkpoint), "--token", "a"]) == 0
    assert "one memory for all of them of 170 keys, 300 tokens" in capsys.readouterr().out


def test_tokens_cannot_write_to_the_terminal() -> None:
    assert shown("\x1b[2J\u202eabc\n") == r"'\x1b[2J\u202eabc\n'"
    assert shown("'s") == '"\'s"'
    assert shown(" é") == "' é'"


def test_a_long_text_shows_where_memory_matters_most() -> None:
    effect = np.linspace(0, 5, 100)
    sentence = Sentence(
        text="a" * 100,
        tokens=(Token(BOS, "<s>"),) * 100,
        targets=tuple(Token(place, f"t{place}") for place in range(100)),
        log_probability=np.zeros(100),
        without_layer=np.zeros((100, 1)),
        without_memory=-effect,
    )
    facts = ModelFacts("m", "artifact", "sha256:0", 0, 1, 1, 8, VOCABULARY, None, (1.0,))
    out = page(Explanation(facts, "", sentences=(sentence,)))
    assert "'t99'" in out
    assert "'t36'" in out
    assert "'t35'" not in out
    assert "36 tokens on which memory has less effect are left out; --json has all." in out
