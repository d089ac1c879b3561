"""Bodies of every protocol with something else in some place: read, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm.server.calls import Call, read_chat, read_completion
from edge_memllm.server.fields import ApiError, BodyFields
from edge_memllm.server.protocols.messages_request import read_message
from edge_memllm.server.protocols.responses_request import read_response
from edge_memllm.server.service import Service

SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"name": "f", "arguments": '{"x": "y"}'}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "completions": (read_completion, {"prompt": ["a", "b"], "max_tokens": 2, "stop": ["x"]}),
    "chat": (
        read_chat,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "r"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
            "stream_options": {"include_usage": True},
            "stream": True,
        },
    ),
    "responses": (
        read_response,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "1", **CALL},
                {"type": "function_call_output", "call_id": "1", "output": "r"},
            ],
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "s", "schema": {}}},
            "metadata": {"a": "b"},
        },
    ),
    "messages": (
        read_message,
        {
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "t"},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": "y"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "1", "content": "r"},
                        {"type": "text", "text": "u"},
                    ],
                },
            ],
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "tool", "name": "f"},
            "metadata": {"user_id": "u"},
            "max_tokens": 3,
        },
    ),
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 1 << 70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["text", "function", "auto", "user", "tool", "f", "{", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "name", "role", "text", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with a key of it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in list(pairs):
        yield value, key
        if isinstance(each, dict | list):
            yield from places(each)


@pytest.mark.parametrize("protocol", BODIES)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_read_is_a_call_or_refused(
    service: Service, protocol: str, data: st.DataObject
) -> None:
    read, body = BODIES[protocol]
    body = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(list(places(body))))
        container[key] = data.draw(VALUES)
    try:
        call = read(BodyFields(body), service)
    except ApiError as error:
        assert 400 <= error.status < 500
        assert str(error).isprintable() or "\n" in str(error)
        str(error.body())
    else:
        assert isinstance(call, Call)
