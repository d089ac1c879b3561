"""A second signal ends the process at once: in the middle of a library, or while one holds Python.

Each case is a program of its own, whose model hangs in C: on a lock that nobody opens, with or
without the interpreter's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from edge_memllm.__main__ import main as launch
from edge_memllm.cli.main import EXIT_INTERRUPTED
from edge_memllm.process import interrupts
from support.checkpoints import MakeArtifact

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
# A lock of zeros is an open one there.
hangs = pytest.mark.skipif(sys.platform != "linux", reason="hangs on a lock of Linux")

# `LIBRARY` is CDLL, which lets other threads go on meanwhile, or PyDLL, which does not.
_HANG = """
import ctypes, sys
from edge_memllm.cli.main import main

def hang(*_, **__):
    library, lock = ctypes.{library}(None), ctypes.create_string_buffer(128)
    print("hangs", file=sys.stderr, flush=True)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)

from {module} import {name}
{name}.{method} = hang
sys.exit(main(sys.argv[1:]))
"""
_STEP = {"module": "edge_memllm_runtimes.ort", "name": "OrtRuntime", "method": "step"}
_ENCODE = {"module": "edge_memllm.text.tokenization", "name": "Tokenizer", "method": "encode"}


@contextmanager
def hanging(library: str, where: dict[str, str], *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command whose model hangs, as a program."""
    code = _HANG.format(library=library, **where)
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_hang(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line == "hangs\n":
            time.sleep(0.3)  # from saying so to doing it
            return
    raise AssertionError("".join(lines))


def end(process: subprocess.Popen[str], number: int) -> float:
    """Send a signal twice; return after how many seconds the process was gone."""
    process.send_signal(number)
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(number)
    process.wait(5)
    return time.monotonic() - start


_WAIT = """
import sys, time
from edge_memllm.cli.main import main
from edge_memllm_runtimes.ort import OrtRuntime

def wait(*_, **__):
    print("hangs", file=sys.stderr, flush=True)
    time.sleep(600)

OrtRuntime.step = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "{}", "--prompt", "x"], "Stopped: the text so far is all there is."),
        (["eval", "{}", "--text", "{text}"], "Stopped before its end. The same command begins"),
    ],
    ids=["run", "eval"],
)
def test_one_ctrl_c_ends_a_command_and_says_what_is_left(
    make_artifact: MakeArtifact, tmp_path: Path, words: list[str], said: str
) -> None:
    (text := tmp_path / "text.txt").write_text("A text. " * 40)
    filled = [each.format(make_artifact(), text=text) for each in words]
    command = [sys.executable, "-c", _WAIT, *filled, "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_hang(process)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("when", ["the command line", "a command"])
def test_ctrl_c_while_something_is_loaded_is_quiet(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    class Loading(ModuleType):
        __getattr__ = interrupted

    if when == "a command":
        monkeypatch.setattr("edge_memllm.cli.main.build_parser", interrupted)
    else:
        monkeypatch.setitem(sys.modules, "edge_memllm.cli.main", Loading("main"))
    assert launch() == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "\n"


@hangs
@pytest.mark.parametrize(
    ("library", "where"),
    [
        pytest.param("CDLL", _STEP, id="a step that lets others go on"),
        pytest.param("PyDLL", _ENCODE, id="a tokenizer that holds the interpreter"),
    ],
)
def test_ctrl_c_twice_ends_a_run_that_hangs(
    make_artifact: MakeArtifact, library: str, where: dict[str, str]
) -> None:
    artifact = str(make_artifact())
    with hanging(library, where, "run", artifact, "--prompt", "x", "--threads", "1") as process:
        wait_for_hang(process)
        assert end(process, signal.SIGINT) < 2
    assert process.returncode == -signal.SIGINT


@hangs
@pytest.mark.parametrize(
    ("library", "where", "number"),
    [
        pytest.param("CDLL", _STEP, signal.SIGTERM, id="a step that lets others go on"),
        pytest.param("PyDLL", _STEP, signal.SIGTERM, id="a step that holds the interpreter"),
        pytest.param("CDLL", _ENCODE, signal.SIGINT, id="a tokenizer that lets others go on"),
        pytest.param("PyDLL", _ENCODE, signal.SIGINT, id="a tokenizer that holds the interpreter"),
    ],
)
def test_a_signal_twice_ends_a_server_that_hangs(
    make_artifact: MakeArtifact, library: str, where: dict[str, str], number: int
) -> None:
    words = ["serve", str(make_artifact()), "--port", "0", "--json", "--drain-seconds", "60"]
    with hanging(library, where, *words, "--threads", "1") as process:
        url = announced(process)
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        wait_for_hang(process)
        assert end(process, number) < 2
        asking.join(5)
    assert process.returncode == -number


@hangs
@pytest.mark.parametrize("where", [_STEP, _ENCODE], ids=["a step", "a tokenizer"])
def test_one_signal_ends_a_server_that_hangs_when_its_time_is_over(
    make_artifact: MakeArtifact, where: dict[str, str]
) -> None:
    words = ["serve", str(make_artifact()), "--port", "0", "--json", "--drain-seconds", "0.2"]
    with hanging("CDLL", where, *words, "--threads", "1") as process:
        url = announced(process)
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        wait_for_hang(process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=15)
        asking.join(5)
    assert process.returncode == 1
    assert "does not come back" in errors
    assert "Traceback" not in errors


@hangs
@pytest.mark.parametrize("where", [_STEP, _ENCODE], ids=["a step", "a tokenizer"])
def test_a_hang_does_not_survive_a_timeout(
    make_artifact: MakeArtifact, where: dict[str, str]
) -> None:
    words = ["serve", str(make_artifact()), "--port", "0", "--json", "--timeout", "0.3"]
    with hanging("CDLL", where, *words, "--threads", "1") as process:
        url = announced(process)
        for stream in (False, True):
            start = time.monotonic()
            body = {"prompt": "x", "stream": stream}
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=10)
            assert time.monotonic() - start < 5
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "deadline_exceeded"
        assert httpx.get(f"{url}/health").status_code == 200


def announced(process: subprocess.Popen[str]) -> str:
    """Wait until a server listens; return its address."""
    assert process.stdout is not None
    lines = []
    while not lines or lines[-1] != "}\n":
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        lines.append(line)
    url: str = json.loads("".join(lines))["url"]
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        try:
            httpx.get(f"{url}/health")
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            return url
    raise AssertionError("the server does not listen")


def ask(url: str) -> None:
    """Ask for something that never comes."""
    with suppress(httpx.TransportError):
        httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=30)


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler")
def test_without_a_signal_all_is_as_before() -> None:
    with interrupts.interruptible():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        with interrupts.taking_one([signal.SIGINT], lambda *_: None):
            pass
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        interrupts.go_on()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupts.interruptible():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts.go_on()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("handler")
def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.interruptible():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("handler")
def test_other_threads_change_nothing() -> None:
    def inside() -> None:
        with interrupts.taking_one([signal.SIGINT], lambda *_: None):
            interrupts.go_on()

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_leaving_waits_for_no_thread(tmp_path: Path) -> None:
    code = (
        "import threading, edge_memllm.process.interrupts as i\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "print('said', end='')\n"
        "i.leave(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout) == (3, "said")
