"""What makes the command line kind: suggestions, completion, colours, and words after Ctrl-C."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.cli import run, train
from edge_memllm.cli.main import COMMANDS, build_parser, command, main
from edge_memllm.cli.output import styled
from edge_memllm.cli.suggestions import likely


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["exprot"], "Did you mean export?"),
        (["overlay", "shw"], "Did you mean show?"),
        (["run", "a", "--promt", "Hi"], "Did you mean --prompt?"),
        (["run", "a", "--max-new", "5"], "Did you mean --max-new-tokens?"),
        (["run", "a", "--promt=x", "--rw"], "Did you mean --prompt and --raw?"),
        (["run", "a", "--device", "cdua"], "Did you mean cuda?"),
    ],
)
def test_what_was_probably_meant_is_said(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize("words", [["sing"], ["run", "a", "--xyz"], ["run", "a", "b"]])
def test_nothing_is_suggested_where_nothing_is_near(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_a_word_stands_for_the_nearest() -> None:
    assert likely("--temprature", ["--temperature", "--top-p"]) == "--temperature"
    assert likely("x", ["--temperature"]) is None


def completions(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_know_every_command_and_their_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = completions(shell, capsys)
    for name, _, _ in COMMANDS:
        assert name in script
    for word in ("max-new-tokens", "auto cpu cuda", "graft"):
        assert word in script
    found = shutil.which(shell)
    if found is not None:
        assert subprocess.run([found, "-n"], input=script, text=True, check=False).returncode == 0


LINES = [
    ("edge-memllm ex", "explain export"),
    ("edge-memllm run --devi", "--device"),
    ("edge-memllm run a --device ", "auto cpu cuda"),
    ("edge-memllm overlay sh", "show"),
    ("edge-memllm completion f", "fish"),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_bash_completes(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = completions("bash", capsys)
    ask = (
        'COMP_WORDS=($LINE); [[ "$LINE" == *" " ]] && COMP_WORDS+=("")\n'
        "COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _edge_memllm; echo ${COMPREPLY[*]}"
    )
    done = subprocess.run(
        ["bash", "-c", f"LINE={line!r}\n{script}{ask}"], capture_output=True, text=True, check=True
    )
    assert " ".join(sorted(done.stdout.split())) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish_completes(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = completions("fish", capsys) + f"complete -C '{line}'\n"
    done = subprocess.run(
        ["fish", "--no-config"], input=script, capture_output=True, text=True, check=True
    )
    found = sorted(each.partition("\t")[0] for each in done.stdout.splitlines())
    assert " ".join(found) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
@pytest.mark.parametrize(
    ("line", "expected"), [*LINES, ("edge-memllm inspect ", "FILES"), ("edge-memllm run -", "-")]
)
def test_zsh_completes(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is offered, of which zsh takes what begins alike; files only where one may stand."""
    around = "compdef() {}\ncompadd() { shift; print -l -- $@ }\n_files() { print FILES }\n"
    words = line.split(" ")
    ask = f"words=({' '.join(map(repr, words))}); CURRENT={len(words)}; _edge_memllm\n"
    done = subprocess.run(
        ["zsh", "-f"],
        input=around + completions("zsh", capsys) + ask,
        capture_output=True,
        text=True,
        check=True,
    )
    offered = done.stdout.split()
    if expected == "-":
        assert "FILES" not in offered
    elif expected == "FILES":
        assert "FILES" in offered
    else:
        found = [each for each in offered if each.startswith(words[-1])]
        assert " ".join(sorted(found)) == expected
        assert "FILES" not in offered


def test_help_fits_into_eighty_columns() -> None:
    parser = build_parser()
    pending: list[Any] = [parser]
    while pending:
        each = pending.pop()
        assert max(map(len, each.format_help().splitlines())) <= 80, each.prog
        for action in each._actions:
            if isinstance(action.choices, dict):
                pending += action.choices.values()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("WT_SESSION", "1")
    assert styled("x", "error", Terminal()) == "\x1b[1;31mx\x1b[0m"
    assert styled("x", "error", io.StringIO()) == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert styled("x", "error", Terminal()) == "x"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("x", "error", Terminal()) == "x"


def test_control_c_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_model", stopped)
    assert main(["run", "a", "--prompt", "x", "--seed", "1"]) == 130
    assert "Stopped: the text so far is all there is. The same command" in capsys.readouterr().err


def test_after_control_c_a_training_can_be_gone_on_with(tmp_path: Path) -> None:
    words = ["train", "--preset", "tiny", "--out", str(tmp_path)]
    asked = command("train").asked(build_parser("train").parse_args(words))  # type: ignore[union-attr]
    assert "nothing of it is kept" in train.interrupted(asked)
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    assert "--resume goes on" in train.interrupted(asked)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--json-schema", "[", "--json-schema: the file is no JSON"),
        ("--json-schema", "[]", "--json-schema: the file holds a list, expected an object"),
    ],
)
def test_a_form_that_is_none_is_refused(
    option: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "form"
    file.write_text(content)
    code = main(["run", "nowhere", "--prompt", "x", option, str(file)])
    assert code == 1
    assert message in capsys.readouterr().err


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_memllm", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("edge-memllm ")
