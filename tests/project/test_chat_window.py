"""The chat program of examples/: its thread and its file, and its window on a virtual screen."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm import loading
from edge_memllm_runtimes.fake import FakeRuntime
from support.chat_program import PROGRAM, chat_once
from support.checkpoints import EOS, VOCABULARY, MakeArtifact
from support.small_model import ScriptedRuntime, open_small_model, write_small_artifact
from support.virtual_screen import virtual_screen

TEMPLATE = b"""{% for each in messages %}[{{ each.role }}]{{ each.content }}{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}"""
needs_screen = pytest.mark.skipif(
    importlib.util.find_spec("tkinter") is None or shutil.which("Xvfb") is None,
    reason="needs tkinter and the program Xvfb",
)


@pytest.fixture
def open_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The program, whose models are over a runtime."""

    def made(runtime: FakeRuntime, **more: Any) -> dict[str, Any]:
        path = write_small_artifact(tmp_path / "chat", 2048, **more).path
        monkeypatch.setattr(loading, "load", lambda *_, progress: open_small_model(path, runtime))
        return runpy.run_path(str(PROGRAM))

    return made


@pytest.fixture
def chatting(open_model: Callable[..., dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """A thread with a model that chats, and a chat."""
    program = open_model(FakeRuntime(VOCABULARY, 2048), chat_template__jinja=TEMPLATE)
    answering = program["Answering"]()
    answering.load("a model")
    assert until_end(answering) == [("ready", "")]
    yield answering, program["Talk"]()
    answering.close()


def until_end(
    answering: Any, each: Callable[[str], None] = lambda _: None
) -> list[tuple[str, str]]:
    came: list[tuple[str, str]] = []
    while not came or came[-1][0] not in ("ready", "end", "failed"):
        came.append(answering.events.get(timeout=120))
        each(came[-1][0])
    return came


def contents(talk: Any) -> list[str]:
    return [each["content"] for each in talk.messages]


def test_a_thread_answers_for_the_window(chatting: tuple[Any, Any]) -> None:
    answering, talk = chatting
    assert talk.title == "New chat"
    answering.answer(talk, "Hi")
    came = until_end(answering)
    assert came[-1][0] == "end" and came[-1][1].endswith("tokens a second")
    said = "".join(text for kind, text in came if kind == "text")
    assert contents(talk) == ["Hi", said]
    assert talk.title == "Hi"


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(chatting: tuple[Any, Any]) -> None:
    answering, talk = chatting
    answering.answer(talk, "Hi")
    came = until_end(answering, lambda kind: answering.stop() if kind == "text" else None)
    assert came[-1] == ("end", "Stopped")
    said = "".join(text for kind, text in came if kind == "text")
    assert contents(talk) == ["Hi", said]
    assert 0 < len(said) < 400


def test_closing_stops_an_answer_and_keeps_it(chatting: tuple[Any, Any]) -> None:
    answering, talk = chatting
    answering.answer(talk, "Hi")
    while answering.events.get(timeout=120)[0] != "text":
        pass
    answering.close()
    assert contents(talk)[0] == "Hi"
    assert contents(talk)[1]


def test_nothing_said_is_nothing_kept(open_model: Callable[..., dict[str, Any]]) -> None:
    runtime = ScriptedRuntime([EOS], prompt_length=2, context=2048)
    program = open_model(runtime, chat_template__jinja=b"ab")
    answering, talk = program["Answering"](), program["Talk"]()
    answering.load("a model")
    until_end(answering)
    answering.answer(talk, "Hi")
    assert until_end(answering) == [("end", "The model had nothing to say")]
    assert talk.messages == []
    answering.close()


def test_a_model_without_a_template_goes_on_with_the_text(
    open_model: Callable[..., dict[str, Any]],
) -> None:
    program = open_model(FakeRuntime(VOCABULARY, 2048))
    answering, talk = program["Answering"](), program["Talk"]()
    answering.load("a model")
    ((kind, said),) = until_end(answering)
    assert (kind, "goes on with your text" in said) == ("ready", True)
    for line in ("Once", " upon"):
        answering.answer(talk, line)
        assert until_end(answering)[-1][0] == "end"
    assert contents(talk)[::2] == ["Once", " upon"]
    answering.close()


def test_what_fails_is_said_and_the_thread_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering = (program := runpy.run_path(str(PROGRAM)))["Answering"]()
    answering.load(str(tmp_path / "nothing"))
    ((kind, said),) = until_end(answering)
    assert (kind, "does not exist" in said) == ("failed", True)
    answering.answer(program["Talk"](), "Hi")
    assert until_end(answering) == [("failed", "There is no model. Choose one at the left.")]
    answering.load(None)
    ((kind, said),) = until_end(answering)
    assert (kind, "This program has failed" in said) == ("failed", True)
    assert "Traceback" in capsys.readouterr().err
    answering.close()


def test_chats_are_kept_in_a_file(tmp_path: Path) -> None:
    program = runpy.run_path(str(PROGRAM))
    history, talk = program["History"](tmp_path / "chats.json"), program["Talk"]
    assert history.read() == []
    said = [{"role": "user", "content": "é\n" * 30}, {"role": "assistant", "content": "x"}]
    history.write([talk(said), talk()])
    assert [each.messages for each in history.read()] == [said]
    assert len(history.read()[0].title) == 32
    assert [each.name for each in tmp_path.iterdir()] == ["chats.json"]


@pytest.mark.parametrize(
    "held", ["", "{", "[]", "{}", '{"chats": [1]}', '{"chats": [{"messages": [{"role": "user"}]}]}']
)
def test_a_file_that_holds_no_chats_is_left_alone(tmp_path: Path, held: str) -> None:
    path = tmp_path / "chats.json"
    path.write_text(held)
    history = runpy.run_path(str(PROGRAM))["History"](path)
    with pytest.raises(ValueError, match=r"chats\.json holds no chats of this program\. Move it"):
        history.read()
    assert path.read_text() == held


def test_a_window_that_cannot_be_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tkinter", None)
    monkeypatch.setattr(sys, "argv", ["chat.py", "artifact"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROGRAM))["main"]()
    assert "no tkinter. Install it, or give --terminal" in capsys.readouterr().err


USE = """
import runpy, sys
from pathlib import Path
program = runpy.run_path(sys.argv[1])
class Still:
    def __init__(self): self.events, self.did = program["SimpleQueue"](), []
    def load(self, path): self.did.append(path)
    def answer(self, talk, line): self.did.append(line)
    def stop(self): self.did.append("stop")
    def close(self): self.did.append("close")
program["Window"].__init__.__globals__["Answering"] = Still
window = program["Window"](["one/a", "two/b"], program["History"](Path(sys.argv[2])))
root, thread = window.root, window.answering
def told(*events):
    for each in events: thread.events.put(each)
    window._look()
    root.update()
def typed(text):
    window.line.insert("end", text)
    window.line.focus_force()
    root.update()
    window.line.event_generate("<Return>")
    root.update()
def shown(): return window.text.get("1.0", "end-1c")
told(("ready", ""))
typed("Hi")
print(thread.did, window.busy, repr(window.line.get("1.0", "end-1c")))
told(("failed", "no room"))
print(window.busy, repr(window.line.get("1.0", "end-1c")), repr(shown()), window.state["text"])
typed("")
window.talk.messages = [dict(role="user", content="Hi"), dict(role="assistant", content="Ho")]
told(("text", "H"), ("text", "o"), ("end", "3 tokens a second"))
print(repr(shown()), window.list.get(0, "end"))
window.copy()
print(repr(root.clipboard_get()))
window.begin()
window.begin()
print(repr(shown()), window.list.get(0, "end"))
window.list.selection_clear(0, "end")
window.list.selection_set(1)
window.list.event_generate("<<ListboxSelect>>")
root.update()
print(repr(shown()))
window.choice.set("b")
window.choice.event_generate("<<ComboboxSelected>>")
root.update()
window.root.event_generate("<Escape>")
root.update()
print(thread.did[-2:], window.busy)
"""


@needs_screen
def test_the_window_as_one_uses_it(tmp_path: Path) -> None:
    with virtual_screen(tmp_path) as screen:
        done = subprocess.run(
            [sys.executable, "-c", USE, str(PROGRAM), str(tmp_path / "chats.json")],
            env={**os.environ, **screen.environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
    said = "You\nHi\nModel\nHo\n"
    assert done.stdout.splitlines() == [
        "['one/a', 'Hi'] True ''",
        "False 'Hi' '' no room",
        f"{said!r} (' Hi',)",
        "'Ho'",
        "'' (' New chat', ' Hi')",
        repr(said),
        "['two/b', 'stop'] True",
    ], done.stderr
    assert len(json.loads((tmp_path / "chats.json").read_text())["chats"]) == 1


@needs_screen
def test_chats_are_there_after_a_restart(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(make_artifact(eos_token_id=None))]
    ((line, said),) = chat_once(command, tmp_path, "Once upon a time")
    assert line == "Once upon a time" and said
    first, second = chat_once(command, tmp_path, "Again")
    assert (first, second[0]) == ([line, said], "Again")
