"""The short programs of examples/ do what they say, with a tiny model and no network."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm import loading
from edge_memllm.session import Session
from support import ROOT
from support.checkpoints import MakeArtifact
from support.server import serving
from support.small_model import open_small_model, write_small_artifact

EXAMPLES = ROOT / "examples"
TEMPLATE = b"""{% for each in messages %}[{{ each.role }}]{{ each.content }}{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def lines(*said: str) -> None:
        rest = iter(said)
        monkeypatch.setattr("builtins.input", lambda _: next(rest))

    return lines


def chat(artifact: Path) -> None:
    runpy.run_path(str(EXAMPLES / "chat.py"))["converse"](str(artifact))


def test_a_text_is_written_in_turns(
    make_artifact: MakeArtifact,
    say: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = make_artifact()
    say("The river", " And then", "")
    chat(artifact)
    with edge_memllm.load(artifact) as model, model.session() as session:
        session.append("The river")
        expected = session.generate(max_new_tokens=60) + "\n"
        session.append(" And then")
        expected += session.generate(max_new_tokens=60) + "\n"
    assert capsys.readouterr().out == expected


def test_a_model_with_a_template_gets_messages(
    tmp_path: Path, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_small_artifact(tmp_path / "chat", chat_template__jinja=TEMPLATE).path
    monkeypatch.setattr(loading, "load", lambda path: open_small_model(Path(path)))
    sessions: list[Session] = []
    stream = Session.stream_chat

    def listening(session: Session, line: str, **options: Any) -> Any:
        sessions.append(session)
        return stream(session, line, max_new_tokens=2)

    monkeypatch.setattr(Session, "stream_chat", listening)
    say("Hi", "", "never")
    chat(path)
    assert len(sessions) == 1
    assert sessions[0].messages[0]["content"] == "Hi"
    say("Hi", "More", "")
    chat(path)
    assert sessions[1] is sessions[2]
    assert [each["role"] for each in sessions[1].messages] == ["user", "assistant"] * 2


@pytest.fixture
def url(make_artifact: MakeArtifact) -> Iterator[str]:
    with edge_memllm.load(make_artifact(), threads=1) as model, serving(model) as served:
        yield f"{served.url}/v1"


def test_a_client_prints_what_the_server_writes(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLES / "client.py"))["main"]("The river", url)
    assert len(capsys.readouterr().out.strip()) > 10
