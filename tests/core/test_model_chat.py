"""Chats in Python: the whole reply, its stream, its calls, and sessions that keep them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from edge_memllm import Model, RequestError
from edge_memllm.engine import Engine
from edge_memllm.engine.request import Request
from edge_memllm.errors import Cancellation
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import EOS, VOCABULARY
from support.engine import GatedRuntime
from support.small_model import ScriptedRuntime, byte_tokenizer, open_small_model
from support.small_model import write_small_artifact as write

TEMPLATE = (
    b"{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    b"[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    b"{{ c.function.name }}</tool_call>{% endfor %}{% endfor %}[assistant]"
)
ROOM = 2048
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("a") / "a", ROOM, chat_template__jinja=TEMPLATE).path


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with open_small_model(path, FakeRuntime(VOCABULARY, ROOM)) as found:
        yield found


def saying(path: Path, text: str, prompt: str) -> Model:
    """A model that says a text behind a prompt."""
    tokenizer = byte_tokenizer()
    script = [*tokenizer.encode(text, special=False), EOS]
    length = len(tokenizer.encode(prompt, special=False))
    return open_small_model(path, ScriptedRuntime(script, length, ROOM))


def test_a_text_is_a_message_and_the_reply_is_its_text(path: Path) -> None:
    with saying(path, "Hello", "[user]Hi[assistant]") as model:
        reply = model.chat("Hi")
    assert str(reply) == reply.text == "Hello"
    assert reply.finish_reason == "stop"
    assert reply.message == {"role": "assistant", "content": "Hello"}
    assert reply.statistics is not None
    assert repr(reply) == "ChatReply(text='Hello', tool_calls=(), finish_reason='stop')"


def test_a_stream_ends_with_the_reply(path: Path) -> None:
    with saying(path, "Hello", "[user]Hi[assistant]") as model:
        pieces = list(model.stream_chat([{"role": "user", "content": "Hi"}]))
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert [piece.reply is None for piece in pieces] == [True] * 5 + [False]


def test_a_stream_of_asyncio_says_the_same(model: Model) -> None:
    async def said() -> str:
        return "".join([piece.text async for piece in model.astream_chat("Hi", max_tokens=7)])

    assert asyncio.run(said()) == model.chat("Hi", max_tokens=7).text


def test_a_call_that_must_come_is_read(model: Model) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "max_tokens": 400, "seed": 1}
    reply = model.chat("Hi", tools=[TOOL], tool_choice="weather", **asked)
    assert reply.finish_reason == "tool_calls"
    assert reply.text == ""
    (call,) = reply.tool_calls
    assert call.name == "weather"
    assert json.loads(call.arguments) == {"city": "Rome"}
    assert reply.message["tool_calls"][0]["function"]["name"] == "weather"
    result = {"role": "tool", "tool_call_id": "call_0", "content": "sunny"}
    assert model.chat([{"role": "user", "content": "Hi"}, reply.message, result], max_tokens=1)


def test_a_form_is_kept_to_and_what_is_cut_off_says_so(model: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    assert model.chat("Hi", response_format=schema).json() == {"a": 1}
    cut = model.chat("Hi", response_format=schema, max_tokens=2)
    assert cut.finish_reason == "length"
    with pytest.raises(RequestError, match="cut off at its limit of tokens, so it is no JSON"):
        cut.json()
    with pytest.raises(RequestError, match=r"the reply is no JSON: .*Ask with a response_format"):
        model.chat("Hi", response_format={"type": "regex", "regex": "a"}).json()


@pytest.mark.parametrize("speculate", [0, 4])
def test_scores_come_with_pieces_and_replies(model: Model, speculate: int) -> None:
    reply = model.chat("Hi", top=2, max_tokens=5, speculate=speculate)
    assert len(reply.scores) == 5
    assert all(len(score.top) == 2 for score in reply.scores)
    assert all(score.logprob == pytest.approx(score.top[0][1]) for score in reply.scores)  # greedy
    assert all(piece.score is not None for piece in model.stream("Hi", top=0, max_tokens=3))
    assert all(piece.score is None for piece in model.stream("Hi", max_tokens=3))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tool_choice": "weather"}, "tool_choice is 'weather', expected auto, none, required"),
        ({"tool_choice": "required"}, "tool_choice is 'required', and there are no tools"),
        ({"tools": [{"name": 1}]}, "a tool is .* expected a function, a Tool, or an object"),
        ({"tools": [len]}, "the tool len: the argument obj has no type hint"),
        (
            {"tools": [TOOL], "response_format": {"type": "regex", "regex": "a"}},
            "tools and a regular expression are both given",
        ),
        ({"max_tokens": 3, "max_new_tokens": 4}, "max_new_tokens is 4 and max_tokens is 3"),
        ({"max_tokens": 0}, "max_tokens is 0, expected an integer of at least 1"),
        ({"temperature": -1}, "temperature is -1, expected a number >= 0"),
        ({"choices": 2}, "choices is 2: one text alone has none of that"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(
    model: Model, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        model.stream_chat("Hi", **asked)


def test_tools_and_scores_are_refused_where_nothing_is_done_with_them(model: Model) -> None:
    with pytest.raises(RequestError, match=r"tools are for chats. Ask with chat or stream_chat"):
        model.stream("Hi", tools=[TOOL])
    with pytest.raises(RequestError, match="generate returns the text alone"):
        model.generate("Hi", top=1)


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    with (
        open_small_model(write(tmp_path / "a").path) as model,
        pytest.raises(RequestError, match=r"no chat template, so it cannot chat. Use generate"),
    ):
        model.chat("Hi")


def test_a_session_keeps_its_chat_and_computes_what_is_new(model: Model) -> None:
    letters = {"type": "regex", "regex": "[a-c]{6}"}  # other bytes are not always what they were
    with model.session() as session:
        first = session.chat("Hi", max_tokens=6, response_format=letters)
        assert session.messages == [{"role": "user", "content": "Hi"}, first.message]
        second = session.chat("More", max_tokens=6)
        assert second.statistics is not None
        assert second.statistics.prompt_tokens == 1 + len("[user]More[assistant]")
        history = session.messages
        assert [message["role"] for message in history] == ["user", "assistant"] * 2
    alone = model.chat([*history[:3]], max_tokens=6)
    assert alone.text == second.text


def test_a_saved_session_goes_on_with_its_chat(model: Model, tmp_path: Path) -> None:
    letters = {"type": "regex", "regex": "[a-c]{6}"}
    with model.session(seed=1) as session:
        session.chat("Hi ä", max_tokens=6, response_format=letters)
        session.save(tmp_path / "a.session")
        with model.restore_session(tmp_path / "a.session") as again:
            assert again.messages == session.messages
            assert len(again.messages) == 2
            wanted, reply = (each.chat("More", max_tokens=6) for each in (session, again))
            assert reply.text == wanted.text
            assert reply.statistics is not None
            assert reply.statistics.prompt_tokens == 1 + len("[user]More[assistant]")
            assert again.messages == session.messages


def test_sessions_chat_in_asyncio(model: Model) -> None:
    async def said() -> list[Any]:
        with model.session(seed=1) as session:
            first = await session.achat("Hi", max_tokens=6)
            pieces = [each async for each in session.astream_chat("More", max_tokens=6)]
            assert pieces[-1].reply is not None
            assert session.messages[1] == first.message
            return session.messages

    with model.session(seed=1) as session:
        session.chat("Hi", max_tokens=6)
        session.chat("More", max_tokens=6)
        assert asyncio.run(said()) == session.messages


def test_an_answer_can_be_awaited_and_is_given_up_with_its_task(path: Path) -> None:
    runtime = GatedRuntime()
    with open_small_model(path, runtime) as model:
        wanted = model.chat("Hi", max_tokens=5).text

        async def leave() -> str:
            assert (await model.achat("Hi", max_tokens=5)).text == wanted
            before = len(runtime.steps)
            runtime.pause_at = before + 3
            task = asyncio.ensure_future(model.achat("Hi", max_tokens=400, ignore_eos=True))
            while runtime.gate.is_set():
                await asyncio.sleep(0.001)
            task.cancel()
            runtime.gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(runtime.steps) <= before + 5
            return (await model.achat("Hi", max_tokens=5)).text

        assert asyncio.run(leave()) == wanted
        with pytest.raises(RequestError, match="cancellation"):
            model.achat("Hi", cancellation=Cancellation())


def test_a_function_is_a_tool(model: Model) -> None:
    def weather(city: Literal["Rome"], days: int | None = None) -> str:
        """Tell the weather of a city.

        Args:
            city: Its name.
            days: How many.
        """
        return f"{city}: sunny for {days}"

    asked: dict[str, Any] = {"temperature": 1.0, "max_tokens": 400, "seed": 1}
    reply = model.chat("Hi", tools=[weather], tool_choice="required", **asked)
    for call in reply.tool_calls:
        assert call.name == "weather"
        assert weather(**json.loads(call.arguments)).startswith("Rome")
    assert reply.tool_calls


def test_a_session_keeps_what_was_said_when_a_stream_is_left(model: Model) -> None:
    with model.session() as session:
        pieces = session.stream_chat("Hi", max_tokens=6)
        text = next(pieces).text
        pieces.close()
        assert session.messages[-1] == {"role": "assistant", "content": text}
        assert session.fork().messages == session.messages
        assert repr(session).startswith("<Session: ")
        assert "2 messages" in repr(session)


def test_a_chat_that_is_longer_than_the_context_is_refused(model: Model) -> None:
    with (
        model.session() as session,
        pytest.raises(RequestError, match=r"context holds 2048. Take messages out"),
    ):
        session.chat("x" * 3000)


def test_what_is_chosen_beside_sampling_replaces_it(model: Model) -> None:
    asked = Request(prompt="Hi", temperature=0.5, top_p=0.9, top_k=3, min_p=0.1)
    found = model.checked(asked).sampling
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 3, 0.1)
    assert model.checked(Request(prompt="Hi", max_tokens=9)).limit == 9


def test_a_model_says_what_it_is(model: Model) -> None:
    assert repr(model).startswith("<Model ")
    assert "on cpu, reader pread" in repr(model)


def test_an_engine_says_what_goes_on(model: Model) -> None:
    with Engine(model, slots=3) as engine:
        assert repr(engine).startswith("<Engine running: 0 of 3 slots busy, 0 queued, of <Model ")
    assert repr(engine).startswith("<Engine ended: ")


@pytest.mark.parametrize(("several", "calls"), [(None, 2), (True, 2), (False, 1)])
def test_a_reply_has_several_calls_or_one(path: Path, several: bool | None, calls: int) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    asked: dict[str, Any] = {"tools": [TOOL], "max_tokens": 300}
    prompt = json.dumps(TOOL) + "[user]Hi[assistant]"
    with saying(path, f"{call}\n{call}", prompt) as model:
        reply = model.chat("Hi", parallel_tool_calls=several, **asked)
    assert [each.name for each in reply.tool_calls] == ["weather"] * calls
    assert reply.finish_reason == "tool_calls"
