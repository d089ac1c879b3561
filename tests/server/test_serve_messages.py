"""Reading chats: messages, the template, and what this server does not do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edge_memllm.engine import Engine
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Settings
from edge_memllm.text.chat import ChatTemplate
from support.server import MODEL_ID, chat, refusal


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "messages is a list of 0, expected a message at least"),
        ({"messages": ["x"]}, "messages[0]", r'messages\[0\] is "x", expected an object'),
        ({"messages": [{}]}, "messages[0].role", r"messages\[0\].role is missing"),
        ({"messages": [{"role": "boss"}]}, "messages[0].role", 'is "boss", expected one of system'),
        ({"messages": [{"role": ["user"]}]}, "messages[0].role", "is a list of 1, expected one of"),
        ({"messages": [{"role": "tool"}]}, "messages[0].tool_call_id", "is missing"),
        ({"messages": [{"role": "function"}]}, "messages[0].role", "Use the role 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content is missing"),
        (
            {"messages": [{"role": "user", "content": []}]},
            "messages[0].content",
            "is a list of 0, expected a part",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "is \"image_url\": this server takes parts of type 'text' only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "is 1, expected text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "is missing",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "colour": "red"}]},
            "messages[0].colour",
            "no parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 200}]},
            "messages",
            "prompt is too long: your messages resulted in",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "Give one of"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, expected an integer from 1 to 50"),
        ({"prompt": "x"}, "prompt", 'no parameter "prompt"'),
        ({"echo": True}, "echo", "echo is not supported by this server: a chat's reply does not"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_by_name(
    service: Service, body: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(chat, service, **body)
    assert error.param == param
    assert re.search(message, str(error))


def test_messages_become_a_prompt(service: Service) -> None:
    messages = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None, "name": "Al"},
    ]
    (prompt,) = chat(service, messages=messages).prompts
    text = service.model.tokenizer.decode(prompt)
    assert text == "[system]D[user]ab[assistant]c"


def test_without_a_template_there_is_no_chat(service: Service) -> None:
    with Engine(service.model) as engine:
        error = refusal(chat, Service(engine, Settings(MODEL_ID)))
    assert error.code == "no_chat_template"
    assert "Use /v1/completions, or start the server with --chat-template FILE." in str(error)


def test_a_template_may_refuse(service: Service) -> None:
    template = ChatTemplate("{{ raise_exception('users first') }}", {})
    with Engine(service.model) as engine:
        error = refusal(chat, Service(engine, Settings(MODEL_ID), template))
    assert error.param == "messages"
    assert "users first" in str(error)


def test_a_template_gets_what_else_it_asks_for(service: Service) -> None:
    template = ChatTemplate("{{ messages[0].content }}{% if not thinks %}[]{% endif %}", {})
    with Engine(service.model) as engine:
        other = Service(engine, Settings(MODEL_ID), template)
        for thinks, expected in ((True, "Hi"), (False, "Hi[]")):
            (prompt,) = chat(other, chat_template_kwargs={"thinks": thinks}).prompts
            assert service.model.tokenizer.decode(prompt) == expected


@pytest.mark.parametrize("name", ["messages", "tools", "a b", "_x", "eos_token"])
def test_a_template_gets_nothing_in_place_of_what_it_gets_anyway(
    service: Service, name: str
) -> None:
    error = refusal(chat, service, chat_template_kwargs={name: 1})
    assert error.param == "chat_template_kwargs"
    assert f'has "{name}", expected names of variables' in str(error)
