"""The command line as a whole: parsing, exit codes, and what becomes of exceptions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_memllm import __version__
from edge_memllm.cli.main import COMMANDS, main
from edge_memllm.cli.options import Command
from edge_memllm.cli.output import byte_count, number, table
from edge_memllm.errors import CorruptionError, missing_extra
from support.small_model import write_small_artifact

NAMES = (
    "demo",
    "train",
    "convert",
    "export",
    "requantize",
    "sweep",
    "verify",
    "run",
    "serve",
    "overlay",
    "list",
    "remove",
    "inspect",
    "eval",
    "explain",
    "layers",
    "suppress",
    "bench",
    "completion",
)


def run_in_process(*words: str, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_every_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(name for name, *_ in COMMANDS) == NAMES
    for name in NAMES:
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"usage: edge-memllm {name}" in shown
        assert f"\nexamples:\n  edge-memllm {name}" in shown
        assert "--json" in shown or name == "completion"


def test_help_fits_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        main([name, "--help"])
        wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
        # argparse breaks nothing inside a group of which one may be given.
        assert [line for line in wide if " | " not in line] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-memllm {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["run"], "the following arguments are required: MODEL"),
        (["run", "a", "--max-new-tokens", "0"], "0 is not a positive number"),
        (["run", "a", "--max-new-tokens", "x"], "invalid positive_int value: 'x'"),
        (["run", "a", "--greedy", "--temperature", "1"], "not allowed with argument"),
        (["run", "a", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["run", "a", "--max-new", "5"], "unrecognized arguments: --max-new 5"),
        (["bench", "a", "--new-tokens", "1"], "1 is not 2 or more"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CorruptionError("t: damaged. Copy it again."), 1, "error: t: damaged. Copy it again.\n"),
        (missing_extra("torch", "export"), 1, "pip install 'FILE.whl[export]'\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such"),
        (OSError("odd"), 1, "error: odd.\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (ZeroDivisionError("1/0"), 70, "This is a bug in edge-memllm."),
        (
            type("Panic", (BaseException,), {})("index 3"),
            70,
            "error: Panic: index 3\nThis is a bug",
        ),
    ],
)
def test_an_exception_becomes_a_message_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(Command, "run", fail)
    assert main(["inspect", "artifact"]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err


def test_debugging_lets_exceptions_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_MEMLLM_DEBUG", "1")
    with pytest.raises(Exception, match="does not exist"):
        main(["inspect", str(tmp_path / "nothing")])


def test_a_closed_pipe_is_silent(tmp_path: Path) -> None:
    write_small_artifact(tmp_path / "artifact")
    process = run_in_process("inspect", str(tmp_path / "artifact"))
    assert process.stdout is not None
    process.stdout.close()  # before it has written anything
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_help_loads_no_library() -> None:
    script = (
        "import sys; from edge_memllm.cli.main import main; main(['--help']); "
        "heavy = {'numpy', 'tokenizers', 'torch', 'onnxruntime', 'tqdm'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (9_999, "9,999 B"),
        (10_000, "10 kB"),
        (21_504_000, "21.5 MB"),
        (999_600_000, "1 GB"),
        (6_456_000_000, "6.46 GB"),
        (12_600_000_000_000, "12.6 TB"),
    ],
)
def test_byte_count(count: int, shown: str) -> None:
    assert byte_count(count) == shown


def test_number_and_table() -> None:
    assert number(1234567) == "1,234,567"
    assert table([("a", "bb"), ("ccc", "")]) == "a    bb\nccc"
