"""The command line, started as shells start programs: streams closed, full, or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_memllm.cli import main as program
from support.small_model import write_small_artifact

if os.name == "nt":
    pytest.skip("needs a shell of Unix", allow_module_level=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("model") / "artifact").path


def shell(line: str, *words: object) -> tuple[int, str, str]:
    """Run a line of a shell, where $0 is the program and $1 ... are words."""
    script = f'"{sys.executable}" -m edge_memllm.cli.main '
    done = subprocess.run(
        ["sh", "-c", line.replace("$0 ", script), "sh", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line", ["$0 inspect $1 >&-", "$0 inspect $1 --json >&-"])
def test_a_closed_output_is_an_error(line: str, artifact: Path) -> None:
    assert shell(line, artifact) == (1, "", "error: standard output: Bad file descriptor.\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("words", ["inspect $1", "inspect $1 --json", "--help", "--version"])
def test_a_full_output_is_an_error(words: str, artifact: Path) -> None:
    expected = (1, "", "error: standard output: No space left on device.\n")
    assert shell(f"$0 {words} >/dev/full", artifact) == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
@pytest.mark.parametrize("end", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_errors_that_nobody_can_read_keep_their_code(end: str, artifact: Path) -> None:
    assert shell(f"$0 inspect $1 {end}", artifact / "no")[:2] == (1, "")
    assert shell(f"$0 inspect $1 {end}", artifact)[0] == 0


def test_a_pipe_that_nobody_reads(artifact: Path) -> None:
    line = "{ $0 inspect $1; echo code $? >&2; } | :"
    code, _, said = shell(line, artifact)
    assert (code, said) == (0, "code 141\n")


def test_a_closed_input_is_an_error(artifact: Path) -> None:
    code, _, said = shell("$0 run $1 <&-", artifact)
    assert (code, said) == (1, "error: standard input: Bad file descriptor.\n")


def test_numbers_of_closed_streams_are_nobody_elses() -> None:
    """What a library prints must not end up in a file that happens to be open."""
    line = (
        f'"{sys.executable}" -c "import os; from edge_memllm.cli.output import prepare_streams;'
        "prepare_streams(); file = os.open('/', os.O_RDONLY); os._exit(file)\" <&- >&- 2>&-"
    )
    assert shell(line)[0] > 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "error: there is not enough memory for this."),
        (RecursionError("deep"), "error: something that was given is nested too deeply"),
        (OSError(5, "Input/output error", "a file"), "error: a file: Input/output error."),
        (OSError(5, "Input/output error"), "error: Input/output error."),
    ],
)
def test_what_a_user_can_cause_is_no_bug(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    assert program.run_command(fail, None) == 1  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith(words)
