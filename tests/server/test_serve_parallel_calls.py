"""How many calls a reply has where its request does not say: one, where the template knows none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.calls import Call, read_chat
from edge_memllm.server.fields import BodyFields
from edge_memllm.server.protocols.messages_request import read_message
from edge_memllm.server.protocols.responses_request import read_response
from edge_memllm.server.service import Service
from support.checkpoints import EOS
from support.server import HELLO, TEMPLATE, Served, serving_small
from support.small_model import ScriptedRuntime, byte_tokenizer, write_small_artifact

ROOM = 4096
Asked = tuple[Served, ScriptedRuntime]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "parameters": SCHEMA}
TWICE = "\n".join(['{"name": "weather", "arguments": {"city": "Rome"}}'] * 2)
CHAT = {
    "messages": HELLO,
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "required",
}
RESPONSE = {"input": "Hi", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
MESSAGE = {
    "messages": HELLO,
    "max_tokens": 300,
    "tools": [{"name": "weather", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any"},
}
SEVERAL = {"tool_choice": {"type": "any", "disable_parallel_tool_use": False}}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder: Path = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a", ROOM).path
    runtime = ScriptedRuntime([], context=ROOM)
    with serving_small(folder, runtime, template=TEMPLATE, engine={"slots": 1}) as served:
        yield served, runtime


def reply(
    asked: Asked, path: str, read: Callable[[BodyFields, Service], Call], body: Mapping[str, Any]
) -> Any:
    """The reply of a model that wants to write the same call twice."""
    served, runtime = asked
    (prompt,) = read(BodyFields(body), served.service).prompts
    runtime.prompt_length = len(prompt)
    runtime.script = [*byte_tokenizer().encode(TWICE, special=False), EOS]
    response = served.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("said", "most"),
    [({}, 1), ({"parallel_tool_calls": False}, 1), ({"parallel_tool_calls": True}, 2)],
)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_of_a_chat(asked: Asked, said: dict[str, Any], most: int, choice: str) -> None:
    body = {**CHAT, **said, "tool_choice": choice}
    (found,) = reply(asked, "/v1/chat/completions", read_chat, body)["choices"]
    assert found["finish_reason"] == "tool_calls"
    assert len(found["message"]["tool_calls"]) == most


@pytest.mark.parametrize(("said", "most"), [({}, 1), ({"parallel_tool_calls": True}, 2)])
def test_of_a_response(asked: Asked, said: dict[str, Any], most: int) -> None:
    found = reply(asked, "/v1/responses", read_response, {**RESPONSE, **said})
    assert [each["type"] for each in found["output"]] == ["function_call"] * most
    assert found["parallel_tool_calls"] is (most > 1)


@pytest.mark.parametrize(("said", "most"), [({}, 1), (SEVERAL, 2)])
def test_of_a_message(asked: Asked, said: dict[str, Any], most: int) -> None:
    found = reply(asked, "/v1/messages", read_message, {**MESSAGE, **said})
    assert [each["type"] for each in found["content"]] == ["tool_use"] * most
