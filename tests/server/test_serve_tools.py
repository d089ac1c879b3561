"""Tools in chats: calls that must come, calls that may, and histories with both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.calls import read_chat
from edge_memllm.server.fields import BodyFields
from edge_memllm.server.service import Service
from edge_memllm.text.chat import ChatTemplate
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import EOS, PAD, VOCABULARY
from support.server import HELLO, TEMPLATE, Served, chat, refusal, serving_small
from support.small_model import ScriptedRuntime, byte_tokenizer, write_small_artifact

ROOM = 4096
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time"}}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "weather"}}
HERMES = ChatTemplate(
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}[assistant]",
    {},
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
HISTORY = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "hot"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("artifact") / "a", ROOM).path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving_small(folder, FakeRuntime(VOCABULARY, ROOM), template=TEMPLATE) as found:
        yield found


@pytest.fixture(scope="module")
def runtime() -> ScriptedRuntime:
    return ScriptedRuntime([], context=ROOM)


@pytest.fixture(scope="module")
def scripted(folder: Path, runtime: ScriptedRuntime) -> Iterator[Served]:
    with serving_small(folder, runtime, template=HERMES, engine={"slots": 1}) as found:
        yield found


def asked(served: Served, **body: Any) -> dict[str, Any]:
    body = {"messages": HELLO, "tools": TOOLS, "max_tokens": 300, **body}
    response = served.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def says(served: Served, runtime: ScriptedRuntime, text: str, **body: Any) -> dict[str, Any]:
    """What a request is, whose reply wants to be `text`."""
    request = {"messages": HELLO, "tools": TOOLS, "max_tokens": 300, **body}
    (prompt,) = read_chat(BodyFields(request), served.service).prompts
    runtime.prompt_length = len(prompt)
    runtime.script = [*byte_tokenizer().encode(text, special=False), EOS]
    return request


def joined(events: list[Any]) -> dict[str, Any]:
    """The choice that the parts of a stream make, as OpenAI's clients put it together."""
    content, calls, reason = "", dict[int, dict[str, Any]](), None
    for event in events[:-1]:
        (choice,) = event["choices"]
        reason = choice["finish_reason"] or reason
        content += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", []):
            call = calls.setdefault(part["index"], {"function": {"arguments": ""}})
            call["function"]["arguments"] += part["function"]["arguments"]
            if "id" in part:
                call |= {"id": part["id"], "type": part["type"]}
                call["function"]["name"] = part["function"]["name"]
    return {"content": content, "calls": [calls[at] for at in sorted(calls)], "reason": reason}


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_must_come_fits_its_schema(served: Served, choice: Any) -> None:
    for seed in range(3):
        found = asked(served, tool_choice=choice, seed=seed, temperature=2)
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
        calls = found["message"]["tool_calls"]
        assert choice == "required" or len(calls) == 1
        assert len({call["id"] for call in calls}) == len(calls)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            assert call["type"] == "function"
            assert call["function"]["name"] == "weather" or arguments == {}
            assert choice == "required" or arguments["city"] in ("Paris", "Rome")


def test_a_stream_has_names_first_and_arguments_in_pieces(served: Served) -> None:
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "max_tokens": 300}
    wanted = {**body, "seed": 4, "temperature": 1.5}
    whole = served.post("/v1/chat/completions", wanted).json()["choices"][0]
    events = served.events("/v1/chat/completions", **wanted)
    found = joined(events)
    assert found["content"] == ""
    assert found["reason"] == "tool_calls"
    assert [each["function"] for each in found["calls"]] == [
        each["function"] for each in whole["message"]["tool_calls"]
    ]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    parts = [p for e in events[:-1] for p in e["choices"][0]["delta"].get("tool_calls", [])]
    assert sum("name" in part["function"] for part in parts) == len(found["calls"])
    assert len(parts) >= 2 * len(found["calls"])


def test_text_and_a_call_come_apart(scripted: Served, runtime: ScriptedRuntime) -> None:
    request = says(scripted, runtime, f"I look.\n{CALL}")
    found = asked(scripted, **request)
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] == "I look."
    (call,) = found["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    streamed = joined(scripted.events("/v1/chat/completions", **request))
    assert streamed["content"] == "I look."
    assert [each["function"] for each in streamed["calls"]] == [call["function"]]


def test_text_alone_stays_text(scripted: Served, runtime: ScriptedRuntime) -> None:
    text = "a < b, and { is a brace. "
    request = says(scripted, runtime, text)
    found = asked(scripted, **request)
    assert (found["finish_reason"], found["message"]["content"]) == ("stop", text)
    assert "tool_calls" not in found["message"]
    assert joined(scripted.events("/v1/chat/completions", **request))["content"] == text


def test_no_more_than_one_call_where_they_may_not_be_parallel(
    scripted: Served, runtime: ScriptedRuntime
) -> None:
    request = says(scripted, runtime, f"{CALL}\n{CALL}")
    assert len(asked(scripted, **request)["message"]["tool_calls"]) == 2
    found = asked(scripted, **request, parallel_tool_calls=False)
    assert len(found["message"]["tool_calls"]) == 1


def test_without_a_choice_of_tools_a_call_is_text(
    scripted: Served, runtime: ScriptedRuntime
) -> None:
    request = says(scripted, runtime, CALL, tool_choice="none")
    found = asked(scripted, **request)
    assert found["message"]["content"] == CALL


def test_a_call_that_is_cut_off_ends_for_its_length(
    scripted: Served, runtime: ScriptedRuntime
) -> None:
    request = says(scripted, runtime, CALL, max_tokens=len(CALL) - 18)
    found = asked(scripted, **request)
    assert found["finish_reason"] == "length"
    assert '{"city": "Rome"}'.startswith(found["message"]["tool_calls"][0]["function"]["arguments"])


def prompt_of(service: Service, **body: Any) -> str:
    (prompt,) = chat(service, **body).prompts
    return service.model.tokenizer.decode(prompt)


def test_a_history_of_calls_becomes_a_prompt(served: Served, scripted: Served) -> None:
    call = '[assistant]{"name": "weather", "arguments": {"city": "Rome"}}'
    assert prompt_of(served.service, messages=HISTORY) == (
        f"[user]Hi{call}[user]Result of weather: hot[assistant]"
    )
    assert prompt_of(scripted.service, messages=HISTORY) == (
        "[user]Hi[assistant]<tool_call>Rome</tool_call>[tool]hot[assistant]"
    )


def test_the_last_message_may_be_gone_on_with(service: Service) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I th"}]
    for said in ({}, {"continue_final_message": True}, {"add_generation_prompt": False}):
        assert prompt_of(service, messages=messages, **said).endswith("I th")
    for said in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        assert prompt_of(service, messages=messages, **said).endswith("I th[assistant]")
    empty = [*HELLO, {"role": "assistant", "content": ""}]
    assert prompt_of(service, messages=empty).endswith("[assistant][assistant]")
    asked_twice = {"continue_final_message": True, "add_generation_prompt": True}
    error = refusal(chat, service, messages=messages, **asked_twice)
    assert error.param == "add_generation_prompt"
    assert "are both true" in str(error)
    twice = refusal(chat, service, messages=[*messages, messages[-1]])
    assert twice.param == "messages"
    assert "Join them" in str(twice)
    joined = prompt_of(service, messages=[*messages, messages[-1]], continue_final_message=False)
    assert joined.endswith("I th[assistant]I th[assistant]")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{}]}, "tools[0].type", "is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "has no tools of its own"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            'is "a b", expected 1 to 64 letters',
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
            "tools[0].function.parameters",
            "is a list of 1, expected a JSON schema",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters.type",
            "is \"array\", expected 'object'",
        ),
        ({"tools": [NOW, NOW]}, "tools", 'two tools of the name "now"'),
        ({"tools": [NOW] * 129}, "tools", "is a list of 129"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", 'is "always", expected'),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "rain"}},
            },
            "tool_choice",
            'names "rain", which is none of tools: weather, now',
        ),
        ({"functions": [{}]}, "functions", "the fields are called `tools`"),
        (
            {"messages": [*HELLO, {"role": "tool", "content": "x"}]},
            "messages[1].tool_call_id",
            "is missing",
        ),
        (
            {"messages": [*HELLO, {"role": "tool", "tool_call_id": "c", "content": "x"}]},
            "messages",
            "no message before it has a call of that id",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages",
            "arguments is no JSON object",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"properties": {"x": {"$ref": "?"}}},
                        },
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
            "cannot be kept to",
        ),
    ],
)
def test_tools_that_cannot_be_are_refused_by_name(
    served: Served, body: dict[str, Any], param: str, message: str
) -> None:
    error = served.refusal("/v1/chat/completions", **{"messages": HELLO, **body})
    assert error["param"] == param
    assert message in error["message"]


def test_a_schema_that_cannot_be_kept_to_is_no_hindrance_where_calls_may_come(
    served: Served,
) -> None:
    odd = {"name": "f", "parameters": {"properties": {"x": {"$ref": "?"}}}}
    tools = [{"type": "function", "function": odd}]
    assert asked(served, tools=tools, max_tokens=4)["finish_reason"]
    strict = [{"type": "function", "function": {**odd, "strict": True}}]
    error = served.refusal("/v1/chat/completions", messages=HELLO, tools=strict)
    assert error["param"] == "tools"


def test_some_of_the_tools_may_be_allowed(served: Served) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    (call,) = asked(served, tool_choice=choice)["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}


def test_an_answer_by_a_schema_or_a_call(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    kinds = set()
    for seed in range(8):
        messages = [{"role": "user", "content": f"Number {seed}?"}]
        wanted = {"response_format": form, "temperature": 2, "seed": seed}
        found = asked(served, messages=messages, **wanted)
        kinds.add(found["finish_reason"])
        assert found["finish_reason"] == "tool_calls" or found["message"]["content"] in (
            '"yes"',
            '"no"',
        )
    assert kinds == {"stop", "tool_calls"}


def test_special_tokens_of_a_form_are_read(folder: Path) -> None:
    """Mistral's marks are special tokens, which have no text anywhere else."""
    content = json.loads((folder / "tokenizer.json").read_text())
    special = [each for each in content["added_tokens"] if each["id"] == PAD]
    special[0]["content"] = "[TOOL_CALLS]"
    content["model"]["vocab"] = {
        "[TOOL_CALLS]" if number == PAD else text: number
        for text, number in content["model"]["vocab"].items()
    }
    changed = json.dumps(content).encode()
    artifact = write_small_artifact(folder.parent / "mistral", ROOM, tokenizer__json=changed)
    template = ChatTemplate("{{ tools }}{{ messages[0].content }}[TOOL_CALLS] [", {})
    runtime = ScriptedRuntime([], context=ROOM)
    with serving_small(artifact.path, runtime, template=template, engine={"slots": 1}) as served:
        request = {"messages": HELLO, "tools": TOOLS, "max_tokens": 300}
        (prompt,) = read_chat(BodyFields(request), served.service).prompts
        runtime.prompt_length = len(prompt)
        text = ' [{"name": "weather", "arguments": {"city": "Rome"}}]'
        written = byte_tokenizer().encode(text, special=False)
        runtime.script = [*byte_tokenizer().encode("So:", special=False), PAD, *written, EOS]
        found = asked(served, **request)
        assert found["message"]["content"] == "So:"
        (call,) = found["message"]["tool_calls"]
        assert call["function"]["arguments"] == '{"city": "Rome"}'
        assert len(call["id"]) == 9
        plain = asked(served, **request, tool_choice="none")
        assert "TOOL_CALLS" not in (plain["message"]["content"] or "")
        one = {"tool_choice": "required", "parallel_tool_calls": False}
        forced = asked(served, **request, **one, temperature=1, seed=1)
        assert forced["finish_reason"] == "tool_calls"
