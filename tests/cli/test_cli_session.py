"""The interactive prompt: conversation, commands, and Ctrl-C that stops the answer alone."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.cli.prompt import Conversation, changed
from edge_memllm.engine.request import Request
from edge_memllm.errors import RequestError
from edge_memllm.model import Model
from edge_memllm.sampling import Sampling
from edge_memllm_runtimes.fake import FakeRuntime
from support import TESTS
from support.small_model import CONTEXT, VOCABULARY, open_small_model, write_small_artifact

TEMPLATE = b"{% for message in messages %}<{{ message.content }}>{% endfor %}"
SETTINGS = Request((), sampling=Sampling(), max_new_tokens=4)

Line = str | type[BaseException]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session")
    write_small_artifact(path / "plain")
    write_small_artifact(path / "chat", chat_template__jinja=TEMPLATE)
    return path


@pytest.fixture
def plain(folder: Path) -> Iterator[Model]:
    with open_small_model(folder / "plain") as model:
        yield model


@pytest.fixture
def chat(folder: Path) -> Iterator[Model]:
    with open_small_model(folder / "chat") as model:
        yield model


def typed(*lines: Line) -> Callable[[str], str]:
    """A reader of these lines; an exception class is raised instead. Then the input ends."""
    waiting = iter(lines)

    def read(_: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def say(model: Model, *lines: Line, **options: Any) -> Conversation:
    session = Conversation(model, SETTINGS, read_line=typed(*lines), **options)
    session.run()
    return session


def expected(model: Model, prompt: str) -> str:
    return model.generate(prompt, max_new_tokens=4, sampling=Sampling())


def test_without_a_template_each_line_is_continued(
    plain: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    say(plain, "one", "", "two")
    shown = capsys.readouterr()
    assert shown.out == f"{expected(plain, 'one')}\n{expected(plain, 'two')}\n\n"
    assert "completion: the model continues each line on its own" in shown.err
    assert "cpu, reader pread (asked for). /help" in shown.err
    assert shown.err.count("first token after") == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (('"""one', "  two", 'three"""'), "one\n  two\nthree"),
        (('"""', "one", "", '/two"""'), "one\n\n/two"),
        (('"""one"""',), "one"),
        (("one\\", "two\\", "three"), "one\ntwo\nthree"),
    ],
)
def test_a_message_may_have_several_lines(
    lines: tuple[str, ...], message: str, chat: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    session = say(chat, *lines)
    assert session.messages[0] == {"role": "user", "content": message}
    assert len(session.messages) == 2


def test_a_form_that_is_cut_off_is_said_to_be(
    chat: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, response_format={"type": "json_object"})
    Conversation(chat, settings, read_line=typed("one")).run()
    assert "[the JSON is cut off after 4 tokens, so it is not complete" in capsys.readouterr().err


def test_with_a_template_the_conversation_is_kept_until_reset(
    chat: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    session = say(chat, "one", "two", "/reset", "three")
    first = expected(chat, "<one>")
    second = expected(chat, f"<one><{first}><two>")
    third = expected(chat, "<three>")
    shown = capsys.readouterr()
    assert shown.out == f"{first}\n{second}\n{third}\n\n"
    assert "chat: the model answers and remembers" in shown.err
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_drafts_change_no_answer(
    chat: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = FakeRuntime.logits
    monkeypatch.setattr(FakeRuntime, "logits", lambda self, state: logits(self, state % 2))
    lines = ("/set max_new_tokens 20", "one", "/set speculate 6", "/reset", "one")
    session = say(chat, *lines)
    shown = capsys.readouterr()
    first, second, _ = shown.out.splitlines()
    assert first == second == session.messages[-1]["content"]
    assert shown.err.count("draft tokens accepted") == 1


def test_raw_leaves_the_template_out(chat: Model, capsys: pytest.CaptureFixture[str]) -> None:
    say(chat, "one", raw=True)
    assert capsys.readouterr().out.startswith(expected(chat, "one") + "\n")


def test_a_conversation_beyond_the_context_is_refused_and_kept(
    chat: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    session = say(chat, "one", "x" * CONTEXT, "/reset", "two")
    shown = capsys.readouterr()
    assert f"model's context holds {CONTEXT}" in shown.err
    assert "/reset forgets the conversation." in shown.err
    assert shown.out.endswith(expected(chat, "<two>") + "\n\n")
    assert len(session.messages) == 2


def test_settings_are_shown_and_changed(plain: Model, capsys: pytest.CaptureFixture[str]) -> None:
    session = say(
        plain,
        "/set temperature 0.7",
        "/set top-k 5",
        "/set max_new_tokens 9",
        "/set stop the end",
        "/set seed 3",
        "/set speculate 6",
        "/set",
    )
    plain_settings = Request((), sampling=Sampling(0.7, top_k=5), max_new_tokens=9)
    chosen = {"stop": ("the end",), "seed": 3, "speculate": 6}
    assert session.settings == replace(plain_settings, **chosen)
    shown = capsys.readouterr().err.splitlines()
    for line in ("temperature 0.7", "top_k 5", "max_new_tokens 9", "stop 'the end'", "seed 3"):
        assert line in shown
    assert "speculate 6" in shown
    cleared = changed(changed(session.settings, "stop", "off"), "seed", "off")
    assert changed(cleared, "speculate", "0") == plain_settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "temperature is 'hot', expected a number"),
        ("top_k", "1.5", "top_k is '1.5', expected a whole number"),
        ("max_new_tokens", "0", "max_new_tokens is 0, expected 1 or more"),
        ("seed", "-1", "seed is -1"),
        ("speculate", "65", "speculate is 65, expected an integer from 0 to 64"),
        ("speculate", "off", "speculate is 'off', expected a whole number"),
        ("colour", "red", "There is no setting 'colour'. There are: temperature, top_k"),
    ],
)
def test_a_wrong_setting_is_refused(
    name: str, value: str, message: str, plain: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match=message.split("'")[0]):
        changed(SETTINGS, name, value)
    assert say(plain, f"/set {name} {value}").settings == SETTINGS
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/help", "/set NAME VALUE"),
        ("/dance now", "error: there is no /dance like this"),
        ("/reset now", "error: there is no /reset like this"),
        ("/set seed", "error: /set seed needs a value"),
        ("/stats", "There was no answer yet."),
    ],
)
def test_other_commands(
    line: str, message: str, plain: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    say(plain, line)
    assert message in capsys.readouterr().err


def test_statistics_on_request(plain: Model, capsys: pytest.CaptureFixture[str]) -> None:
    say(plain, "one", "/stats", statistics=False)
    assert capsys.readouterr().err.count("first token after") == 1


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_leaving(word: str, plain: Model, capsys: pytest.CaptureFixture[str]) -> None:
    say(plain, word, "not read")
    assert capsys.readouterr().out == ""


def test_control_c_twice_at_the_prompt_leaves(
    plain: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    say(plain, KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "not read")
    shown = capsys.readouterr()
    assert shown.out == f"{expected(plain, 'one')}\n\n"
    assert shown.err.count("Ctrl-C again, or Ctrl-D, leaves.") == 2


class InterruptedRuntime(FakeRuntime):
    """Ctrl-C strikes in the third step of the first answer."""

    steps = 0

    def step(self, *arguments: Any, **options: Any) -> Any:
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt
        return super().step(*arguments, **options)


def test_control_c_stops_the_answer_and_keeps_what_was_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = InterruptedRuntime(VOCABULARY, CONTEXT)
    with open_small_model(folder / "chat", runtime) as model:
        session = say(model, "one", "/stats", "two")
        whole = expected(model, "<one>")
    shown = capsys.readouterr()
    begun = session.messages[1]["content"]
    assert whole.startswith(begun)
    assert len(begun) < len(whole)
    assert "[stopped]" in shown.err
    assert "stopped before its statistics were complete" in shown.err
    assert len(session.messages) == 4


SLOW_SESSION = """
import sys, time
from pathlib import Path
import edge_memllm
from edge_memllm.cli.main import main
from edge_memllm_runtimes.fake import FakeRuntime
from support.small_model import CONTEXT, VOCABULARY, open_small_model

class Slow(FakeRuntime):
    def step(self, *arguments, **options):
        time.sleep(0.05)
        return super().step(*arguments, **options)

edge_memllm.load = lambda path, **_: open_small_model(path, Slow(VOCABULARY, CONTEXT))
sys.exit(main(["run", sys.argv[1], "--greedy", "--max-new-tokens", "100"]))
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.screen, inner = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=os.environ | environment,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(inner),
        )
        os.close(inner)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What is shown up to and with ``text``."""
        shown, end = b"", time.monotonic() + seconds
        while text.encode() not in shown:
            ready, _, _ = select.select([self.screen], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come, but {shown!r}"
            shown += os.read(self.screen, 1)
        return shown.decode(errors="replace")

    def close(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self.screen)
        return code


def _take_terminal(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    # A test run started in the background ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_control_c_at_a_real_terminal(folder: Path) -> None:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    terminal = Terminal(
        sys.executable, "-c", SLOW_SESSION, str(folder / "plain"), PYTHONPATH=path, TERM="dumb"
    )
    terminal.wait_for(">>> ")
    terminal.type("hello\n")
    terminal.wait_for("hello")
    time.sleep(0.5)  # some of the answer's five seconds
    terminal.type("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for(">>> ")
    terminal.type("/quit\n")
    assert terminal.close() == 0
