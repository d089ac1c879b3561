"""``edge-memllm run`` with one prompt: what goes where, and that every option arrives."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm.cli.main import main
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import MakeArtifact
from support.small_model import byte_tokenizer, open_small_model, write_small_artifact

TEMPLATE = b"{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``run`` gets a small model over the fake runtime; returns the options of ``load``."""
    write_small_artifact(tmp_path / "plain")
    write_small_artifact(tmp_path / "chat", chat_template__jinja=TEMPLATE)
    seen: dict[str, Any] = {}

    def load(path: Path, **options: Any) -> edge_memllm.Model:
        seen.update(options)
        return open_small_model(path)

    monkeypatch.setattr(edge_memllm, "load", load)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def run(loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``run(*words) -> (stdout, stderr)`` of a command that succeeds."""

    def call(*words: str) -> tuple[str, str]:
        assert main(["run", *words]) == 0
        shown = capsys.readouterr()
        return shown.out, shown.err

    return call


def test_text_goes_to_stdout_and_one_line_of_figures_to_stderr(run: Any) -> None:
    out, err = run("plain", "--prompt", "hello", "--max-new-tokens", "6", "--greedy")
    with open_small_model(Path("plain")) as model:
        expected = model.generate("hello", max_new_tokens=6, sampling=edge_memllm.Sampling())
    assert out == expected + "\n"
    assert err.count("\n") == 1
    for part in ("6 tokens", "tokens/s", "first token after", "read from the table per token"):
        assert part in err


def test_no_stats(run: Any) -> None:
    assert run("plain", "--prompt", "hello", "--no-stats")[1] == ""


def test_json_is_one_object(run: Any) -> None:
    out, err = run("plain", "--prompt", "hello", "--max-new-tokens", "5", "--seed", "7", "--json")
    report = json.loads(out)
    assert err == ""
    assert report["completion_tokens"] == 5
    assert report["prompt_tokens"] == 5
    assert report["finish_reason"] == "length"
    assert report["seed"] == 7
    assert report["mode"] == "completion"
    assert {"text", "table_bytes_read_per_token", "decode_tokens_per_second"} <= report.keys()
    assert report["record_wait_seconds"] > 0
    assert report["draft_tokens"] == report["accepted_tokens"] == 0


def test_same_seed_same_text(run: Any) -> None:
    words = ("plain", "--prompt", "hello", "--temperature", "1", "--json", "--seed")
    texts = [json.loads(run(*words, seed)[0])["text"] for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


def test_drafts_are_told_of_and_change_no_text(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = FakeRuntime.logits
    monkeypatch.setattr(FakeRuntime, "logits", lambda self, _: logits(self, 0))
    words = ("plain", "--prompt", "hello", "--greedy", "--max-new-tokens", "30")
    plain, without = run(*words)
    text, line = run(*words, "--speculate", "8")
    report = json.loads(run(*words, "--speculate", "8", "--json")[0])
    assert text == plain
    assert report["text"] + "\n" == plain
    figures = f"{report['accepted_tokens']} of {report['draft_tokens']} draft tokens accepted"
    assert figures in line
    assert report["accepted_tokens"] > 20
    assert "draft" not in without


def test_prompt_from_standard_input(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))  # as `echo hello |` gives it
    assert run("plain", "--greedy")[0] == run("plain", "--greedy", "--prompt", "hello")[0]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second as in LC_ALL=C
def test_standard_input_that_is_no_text(
    loaded: object, errors: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8", errors))
    assert main(["run", "plain"]) == 1
    assert "Standard input is not UTF-8 text. Convert it to UTF-8." in capsys.readouterr().err


def test_stop_strings_end_the_text(run: Any) -> None:
    whole = json.loads(run("plain", "--prompt", "a", "--greedy", "--json")[0])["text"]
    stops = ("--stop", whole[4:6], "--stop", whole[2:4])
    report = json.loads(run("plain", "--prompt", "a", "--greedy", "--json", *stops)[0])
    assert report["text"] == whole[: whole.index(whole[2:4])]
    assert report["finish_reason"] == "stop"


def test_a_token_ends_the_text(run: Any) -> None:
    words = ("plain", "--prompt", "a", "--greedy", "--json")
    whole = json.loads(run(*words)[0])["text"]
    report = json.loads(
        run(*words, "--stop-token-id", str(byte_tokenizer().encode(whole[3])[0]))[0]
    )
    assert report["text"] == whole[: whole.index(whole[3])]
    assert report["finish_reason"] == "stop"


def test_a_template_makes_a_message_of_the_prompt(run: Any) -> None:
    words = ("--greedy", "--max-new-tokens", "5", "--json", "--prompt")
    chat = json.loads(run("chat", *words, "hello")[0])
    same = json.loads(run("chat", "--raw", *words, "<hello>")[0])
    assert (chat["mode"], same["mode"]) == ("chat", "completion")
    assert chat["text"] == same["text"]


def test_loading_options_arrive(run: Any, loaded: dict[str, Any]) -> None:
    options = ("--device", "cpu", "--reader", "ram", "--threads", "3", "--prefill-chunk", "9")
    run("plain", "--prompt", "a", *options)
    expected = {
        "device": "cpu",
        "reader": "ram",
        "threads": 3,
        "prefill_chunk": 9,
        "table_quality": "full",
    }
    assert expected.items() <= loaded.items()
    assert loaded["packed_cache"] == "auto"
    left = loaded.keys() - expected.keys() - {"progress", "packed_cache"}  # the rest is left
    assert not any(loaded[name] for name in left)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, expected a number >= 0"),
        (["--prompt", "a", "--top-k", "-1"], "top_k is -1"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "a", "--min-p", "2"], "min_p is 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--speculate", "-1"], "speculate is -1, expected an integer from 0"),
        (["--prompt", "a", "--stop", ""], "a stop string has 0 characters"),
        (["--prompt", "a" * 500], "the prompt has 500 tokens"),
    ],
)
def test_what_cannot_be_done_is_an_error(
    words: list[str], message: str, loaded: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "plain", *words]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_json_needs_a_prompt(
    loaded: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["run", "plain", "--json"]) == 1
    assert "--json answers one prompt. Give it with --prompt" in capsys.readouterr().err


def test_output_of_a_narrow_encoding(make_artifact: MakeArtifact) -> None:
    words = ["run", str(make_artifact()), "--prompt", "h", "--max-new-tokens", "8", "--no-stats"]
    done = subprocess.run(
        [sys.executable, "-m", "edge_memllm.cli.main", *words],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"?" in done.stdout


def test_an_exported_model_in_a_process_of_its_own(make_artifact: MakeArtifact) -> None:
    """Everything real: artifact, ONNX Runtime, process. And no torch on the way."""
    script = (
        "import sys; from edge_memllm.cli.main import main; "
        "code = main(sys.argv[1:]); "
        "sys.exit('torch was loaded' if 'torch' in sys.modules else code)"
    )
    words = ["run", str(make_artifact()), "--prompt", "hello", "--greedy", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["completion_tokens"] > 0
    assert report["device"] == "cpu"
