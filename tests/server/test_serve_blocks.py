"""`/v1/messages`: Anthropic's blocks, its events, its errors and its key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.service import Service
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import EOS, VOCABULARY
from support.server import HELLO, TEMPLATE, Served, message, refusal, serving_small
from support.small_model import ScriptedRuntime, byte_tokenizer, write_small_artifact

ROOM = 4096
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "hot"}
NAMED = {"type": "tool", "name": "weather"}
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("artifact") / "a", ROOM).path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving_small(folder, FakeRuntime(VOCABULARY, ROOM), template=TEMPLATE) as found:
        yield found


def asked(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post(PATH, {"messages": HELLO, "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_message_is_the_chats_text(served: Served) -> None:
    body = {"max_tokens": 9, "temperature": 0}
    found = asked(served, **body, system=[{"type": "text", "text": "Be brief."}])
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    chat = served.post("/v1/chat/completions", {"messages": messages, **body}).json()
    text = chat["choices"][0]["message"]["content"]
    assert found["content"] == [{"type": "text", "text": text}]
    assert (found["type"], found["role"], found["stop_reason"]) == (
        "message",
        "assistant",
        "max_tokens",
    )
    usage = found["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert (prompt, usage["output_tokens"]) == (chat["usage"]["prompt_tokens"], 9)


@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True}, NAMED])
def test_a_tool_is_used(served: Served, choice: dict[str, Any]) -> None:
    found = asked(served, tools=[WEATHER], tool_choice=choice)
    assert found["stop_reason"] == "tool_use"
    (block,) = found["content"]
    assert (block["type"], block["name"]) == ("tool_use", "weather")
    assert block["input"]["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("body", "block", "delta"),
    [
        ({"max_tokens": 6, "ignore_eos": True}, "text", "text_delta"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_use", "input_json_delta"),
    ],
)
def test_a_stream_has_anthropics_events_in_their_order(
    served: Served, body: dict[str, Any], block: str, delta: str
) -> None:
    wanted = {"messages": HELLO, "max_tokens": 100, "seed": 3, **body}
    events = served.events(PATH, **wanted)
    assert list(dict.fromkeys(each["type"] for each in events)) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    assert events[1]["content_block"]["type"] == block
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    assert {each["type"] for each in deltas} == {delta}
    assert len(deltas) > 1
    whole = asked(served, **wanted)
    if block == "text":
        assert "".join(each["text"] for each in deltas) == whole["content"][0]["text"]
    else:
        written = "".join(each["partial_json"] for each in deltas)
        assert json.loads(written) == whole["content"][0]["input"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"stop_sequences": ["zzz"]}, "end_turn", None),
        ({"stop_sequences": ["four", "our"]}, "stop_sequence", "four"),
        ({"max_tokens": 5}, "max_tokens", None),
    ],
)
def test_why_a_reply_ended_is_told(
    folder: Path, body: dict[str, Any], reason: str, sequence: str | None
) -> None:
    prompt = "[user]Hi[assistant]"
    script = [*byte_tokenizer().encode("three, four, five", special=False), EOS]
    runtime = ScriptedRuntime(script, len(prompt), ROOM)
    with serving_small(folder, runtime, template=TEMPLATE, engine={"slots": 1}) as served:
        found = asked(served, temperature=0, **body)
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, sequence)


def prompt_of(service: Service, **body: Any) -> str:
    (prompt,) = message(service, **body).prompts
    return service.model.tokenizer.decode(prompt)


def test_blocks_become_messages(served: Served) -> None:
    said = [{"type": "text", "text": "I look."}, USE]
    results = [RESULT, {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}}]
    messages = [
        *HELLO,
        {"role": "assistant", "content": said},
        {"role": "user", "content": results},
    ]
    assert prompt_of(served.service, messages=messages) == (
        '[user]Hi[assistant]I look.\n{"name": "weather", "arguments": {"city": "Rome"}}'
        "[user]Result of weather: hot\nSo?[assistant]"
    )


def test_a_last_message_of_the_assistant_is_gone_on_with(service: Service) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I th"}]
    assert prompt_of(service, messages=messages) == "[user]Hi[assistant]I th"


@pytest.mark.parametrize(
    ("body", "param", "message_part"),
    [
        ({"max_tokens": None}, "max_tokens", "is missing"),
        ({"messages": []}, "messages", "expected a message at least"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", 'is "system"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
            "takes blocks of the types 'text', 'tool_result' here",
        ),
        (
            {"messages": [{"role": "user", "content": [RESULT]}]},
            "messages[0].content[0].tool_use_id",
            "no message before it uses a tool so",
        ),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "is missing"),
        ({"tools": [{"type": "bash_1", "name": "bash"}]}, "tools[0].type", "run it yourself"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type", 'is "some"'),
        ({"thinking": {"type": "enabled"}}, "thinking", "one way of answering"),
        ({"stop": "x"}, "stop", "no parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    service: Service, body: dict[str, Any], param: str, message_part: str
) -> None:
    error = refusal(message, service, **body)
    assert error.param == param
    assert message_part in str(error)


def test_errors_have_anthropics_shape(served: Served) -> None:
    for body, status, kind in (
        ({"model": "x"}, 404, "not_found_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
    ):
        response = served.post(PATH, {"messages": HELLO, "max_tokens": 5, **body})
        assert response.status_code == status
        found = response.json()
        assert (found["type"], found["error"]["type"]) == ("error", kind)
        assert found["error"]["message"]


def test_tokens_are_counted(served: Served) -> None:
    body = {"messages": HELLO, "system": "Be brief.", "tools": [WEATHER]}
    counted = served.post(f"{PATH}/count_tokens", body).json()["input_tokens"]
    usage = asked(served, **body, max_tokens=1)["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    refused = served.post(f"{PATH}/count_tokens", {"messages": []})
    assert (refused.status_code, refused.json()["type"]) == (400, "error")


def test_a_key_may_come_as_anthropics_clients_send_it(folder: Path) -> None:
    keys = {"api_keys": ("secret-key",), "template": TEMPLATE}
    with serving_small(folder, FakeRuntime(VOCABULARY, ROOM), **keys) as served:
        body = {"messages": HELLO, "max_tokens": 1}
        assert served.post(PATH, body).status_code == 401
        assert served.post(PATH, body, headers={"x-api-key": "wrong"}).status_code == 401
        assert served.post(PATH, body, headers={"x-api-key": "secret-key"}).status_code == 200
