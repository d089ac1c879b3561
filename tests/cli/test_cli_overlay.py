"""``edge-memllm overlay`` and what other commands do with overlays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edge_memllm
from edge_memllm import Model
from edge_memllm.cli.main import main
from edge_memllm.cli.prompt import Conversation
from edge_memllm.engine.request import Request
from edge_memllm.overlays import Edit, OverlaySpec, open_overlay, overlay_of
from edge_memllm.sampling import Sampling
from support.checkpoints import LAYERS, MakeArtifact, MakeCheckpoint
from support.small_model import open_small_model, write_small_artifact

FILE = "o.overlay.safetensors"
Call = Callable[..., tuple[str, str]]


@pytest.fixture
def call(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """``call(*words, code=0) -> (stdout, stderr)`` in a folder with the artifacts a and b."""
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).symlink_to(make_artifact(seed=seed))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(list(words)) == code
        shown = capsys.readouterr()
        return shown.out, shown.err

    return run


def edit(call: Call, *words: str, **options: Any) -> tuple[str, str]:
    return call("overlay", "edit", "a", *words, "--out", FILE, **options)


# --- edit and show ---------------------------------------------------------------------------


def test_edit_then_show_then_run(call: Call) -> None:
    out, _ = edit(call, "--token", "#101", "#102", "--like", "#103", "--layers", "1")
    assert "changes  2 rows" in out
    assert "stored   2 rows as int8-g64" in out
    assert f"overlay  {FILE}, " in out
    shown, _ = call("overlay", "show", FILE, "--artifact", "a")
    assert "overlay  o\n" in shown
    assert "changes  2 rows of 2 tokens" in shown
    assert shown.count("1: replace") == 2
    plain, _ = call("run", "a", "--prompt", "hi f", "--greedy", "--max-new-tokens", "8", "--json")
    laid, _ = call(
        *("run", "a", "--prompt", "hi f", "--greedy", "--max-new-tokens", "8", "--json"),
        *("--overlay", FILE),
    )
    assert json.loads(plain)["overlays"] == []
    assert json.loads(laid)["overlays"] == ["o"]


def test_every_way_of_editing(call: Call) -> None:
    for ways, expected in (
        (["--scale", "0.5"], "scale 0.5"),
        (["--blank"], "blank"),
        (["--like", "#9", "--strength", "0.5"], "replace"),
    ):
        edit(call, "--token", "#101", *ways, "--force")
        shown, _ = call("overlay", "show", FILE)
        assert f"#101   0-1: {expected}" in shown


def test_edits_from_a_file(call: Call) -> None:
    Path("e.toml").write_text('[[edit]]\ntokens = ["#1"]\nblank = true\nlayers = [1]\n')
    words = ("--name", "quiet", "--description", "Says\nless.", "--codec", "f32")
    edit(call, "--edits", "e.toml", *words)
    overlay = open_overlay(FILE)
    assert (overlay.name, overlay.spec.codec, len(overlay)) == ("quiet", "f32", 1)
    shown, _ = call("overlay", "show", FILE)
    assert "about    Says" in shown


def test_what_is_told_as_json(call: Call) -> None:
    out, _ = edit(call, "--token", "#101", "--scale", "2", "--json")
    told = json.loads(out)
    assert (told["path"], told["name"], told["entries"], told["rows"]) == (FILE, "o", 2, 0)
    edit(call, "--token", "#7", "--like", "#8", "--force")
    out, _ = call("overlay", "show", FILE, "--artifact", "a", "--json")
    found = json.loads(out)
    assert [each["layer"] for each in found["edits"]] == [0, 1]
    assert found["edits"][0]["norm"] > 0
    assert found["edits"][0]["text"]
    assert found["edits"][0]["factor"] is None


def test_many_tokens_are_not_all_listed(call: Call) -> None:
    edit(call, "--token", *(f"#{token}" for token in range(50)), "--blank")
    shown, _ = call("overlay", "show", FILE)
    assert "#39    0-1: blank" in shown
    assert "and 10 tokens more; --json lists all." in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--blank"], "No tokens are named. Give --token WORD, or --edits FILE."),
        (["--token", "#1", "--edits", "e"], "--token has no effect with --edits"),
        (["--blank", "--edits", "e"], "--blank has no effect with --edits"),
        (["--token", "#1"], "none of them given, expected one of scale, blank, like"),
        (["--token", "#999", "--blank"], "token #999 is not in the vocabulary"),
        (["--token", "hello", "--blank"], "'hello' is several tokens"),
        (["--token", "#1", "--blank", "--layers", "7"], "Layer 7: the model has memory rows 0"),
        (["--token", "#1", "--like", "#2", "--codec", "int2"], "stores rows as 'int2'"),
        (["--token", "#1", "--blank", "--name", "a b"], "The name of an overlay is 'a b'"),
        (["--edits", "nothing.toml"], "nothing.toml: No such file"),
    ],
)
def test_edits_that_cannot_be(call: Call, words: list[str], message: str) -> None:
    _, error = edit(call, *words, code=1)
    assert message in error
    assert not Path(FILE).exists()


def test_usage(call: Call) -> None:
    assert "not allowed with" in edit(call, "--token", "#1", "--blank", "--scale", "1", code=2)[1]
    assert "are no layers" in edit(call, "--token", "#1", "--blank", "--layers", "x", code=2)[1]
    assert "required: COMMAND" in call("overlay", code=2)[1]
    assert (
        "1.5 is not a number from 0"
        in call("overlay", "difference", "a", "b", "--tolerance", "1.5", "--out", FILE, code=2)[1]
    )


def test_a_file_that_is_there_is_kept_without_force(call: Call) -> None:
    edit(call, "--token", "#1", "--blank")
    _, error = edit(call, "--token", "#2", "--blank", code=1)
    assert "there is a file already" in error
    assert [each.token for each in open_overlay(FILE).edits()] == [1, 1]


def test_show_refuses_what_does_not_fit(call: Call, make_artifact: MakeArtifact) -> None:
    edit(call, "--token", "#1", "--blank")
    _, error = call("overlay", "show", FILE, "--artifact", "b", code=1)
    assert "Overlay 'o' is for model" in error
    _, error = call("run", "b", "--prompt", "x", "--overlay", FILE, code=1)
    assert "Overlay 'o' is for model" in error


# --- graft and difference --------------------------------------------------------------------


def test_a_graft_of_everything_is_the_other_model(call: Call) -> None:
    out, _ = call("overlay", "graft", "a", "b", "--out", FILE, "--json")
    assert json.loads(out)["rows"] == 300 * LAYERS
    every = np.arange(300)
    with edge_memllm.load("a", overlays=[FILE]) as over, edge_memllm.load("b") as other:
        np.testing.assert_array_equal(over.source.rows(every), other.source.rows(every))
    call("overlay", "graft", "a", "b", "--token", "#4", "--layers", "0", "--out", FILE, "--force")
    assert [(each.token, each.layer) for each in open_overlay(FILE).edits()] == [(4, 0)]


def test_a_difference_of_artifacts_names_what_is_not_rows(call: Call) -> None:
    _, error = call("overlay", "difference", "a", "b", "--out", FILE, code=1)
    assert "The graphs of a and b differ" in error
    out, _ = call("overlay", "difference", "a", "a", "--out", FILE)
    assert "differing  0 of 600 rows (0.00%)" in out


def test_a_difference_of_checkpoints(
    call: Call, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint()
    tuned = shutil.copytree(base, tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.1.memory.down_proj.weight"][:9] *= -1
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    out, _ = call("overlay", "difference", str(base), "tuned", "--out", FILE)
    assert "differing  300 of 600 rows (50.00%)" in out
    assert "stored     300 rows as f16" in out
    call("run", "a", "--prompt", "x", "--overlay", FILE)
    _, error = call("overlay", "difference", str(base), "a", "--out", FILE, code=1)
    assert "a checkpoint, a is an artifact: expected two of a kind" in error
    _, error = call("overlay", "difference", str(tmp_path), "a", "--out", FILE, code=1)
    assert "neither an artifact nor a checkpoint" in error


# --- eval and the session --------------------------------------------------------------------


def test_eval_measures_with_overlays_against_a_reference_without(call: Call) -> None:
    Path("t.txt").write_text("a text of some words, " * 4)
    edit(call, "--token", *"tex", "--blank")
    words = ("eval", "a", "--text", "t.txt", "--json")
    plain = json.loads(call(*words)[0])
    found = json.loads(call(*words, "--overlay", FILE, "--reference", "a")[0])
    assert found["perplexity"] != plain["perplexity"]
    reference = found["divergence"]["reference_perplexity"]
    assert reference == pytest.approx(plain["perplexity"], rel=1e-12)
    assert found["divergence"]["mean_kl"] > 0


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    with open_small_model(write_small_artifact(tmp_path / "small").path) as opened:
        for name, token in (("first", 101), ("second", 110)):
            spec = OverlaySpec.for_model(opened.manifest, name)
            opened.add_overlay(overlay_of(spec, [Edit(token, 0, "blank")]))
        yield opened


def test_a_session_lists_and_switches_overlays(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/overlays", "/overlays none", "one", "/overlays second first", "one"])
    more = iter(["/overlays third", "/overlays second second", "/overlays all", "one", "/help"])

    def read(_: str) -> str:
        line = next(lines, None) or next(more, None)
        if line is None:
            raise EOFError
        return line

    Conversation(model, Request((), sampling=Sampling(), max_new_tokens=6), read_line=read).run()
    shown = capsys.readouterr()

    def said(*overlays: str) -> str:
        return model.generate("one", max_new_tokens=6, sampling=Sampling(), overlays=overlays)

    expected = [said(), said("second", "first"), said("first", "second")]
    assert shown.out == "".join(f"{each}\n" for each in expected) + "\n"
    for note in (
        "on: first, second; off: none",
        "on: none; off: first, second",
        "on: second, first; off: none",
        "error: there is no overlay 'third'. on: second, first; off: none",
        "on: second; off: first",
        "overlays second first]",
        "/overlays NAME ...   use these, in this order",
    ):
        assert note in shown.err
