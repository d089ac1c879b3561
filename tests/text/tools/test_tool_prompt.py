"""Messages with tools: as transformers renders them, and in words where a template has none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_memllm import RequestError
from edge_memllm.text.chat import ChatTemplate
from edge_memllm.text.tools import Tool
from edge_memllm.text.tools.prompt import template_format, with_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = Tool("weather", "The weather of a city", SCHEMA)
PLAIN = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", {})
HERMES = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}
{%- for c in m.tool_calls %}{% if c.function %}{% set c = c.function %}{% endif %}
{{- '\\n<tool_call>\\n{"name": "' + c.name + '", "arguments": ' }}{{ c.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}
{%- elif not loop.first or m.role != 'system' %}{{ m.role + ': ' + m.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA = """
{%- for m in messages %}
{%- if m.role == 'user' and loop.first and tools is not none %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary}\\n' }}
{%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}{% endif %}
{%- if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}
{{- '{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' %}ipython: {{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}
{%- endfor %}
"""


def history(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": arguments}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "blue"}'},
    ]


@pytest.mark.parametrize(("source", "name"), [(HERMES, "hermes"), (LLAMA, "llama")])
@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_a_template_with_tools_gets_what_transformers_gives_it(
    source: str, name: str, tools: tuple[Tool, ...]
) -> None:
    from transformers.utils import chat_template_utils as theirs

    template = ChatTemplate(source, {})
    assert template_format(template).name == name
    messages, given = with_tools(template, history('{"city": "Paris"}'), tools)
    ((expected,), _) = theirs.render_jinja_template(
        [history({"city": "Paris"})],
        chat_template=source,
        tools=[dict(tool.as_given()) for tool in tools] or None,
        add_generation_prompt=True,
    )
    assert template.render(messages, tools=given) == expected
    assert '"arguments": "' not in expected


def test_a_tool_is_shown_as_it_was_given() -> None:
    given = {"type": "function", "function": {"name": "weather", "x": [1, 2]}}
    _, found = with_tools(ChatTemplate(HERMES, {}), [], [Tool("weather", given=given)])
    assert found == [given]


def test_a_template_without_tools_gets_them_in_words() -> None:
    messages, given = with_tools(PLAIN, history('{"city": "Paris"}'), [TOOL])
    assert given is None
    system, user, call, result = messages
    assert system["content"].startswith("Be brief.\n\nYou can call these tools:")
    assert json.dumps(SCHEMA) in system["content"]
    assert user == {"role": "user", "content": "Paris?"}
    content = '{"name": "weather", "arguments": {"city": "Paris"}}'
    assert call == {"role": "assistant", "content": content}
    assert result == {"role": "user", "content": 'Result of weather: {"sky": "blue"}'}


def test_roles_alternate_behind_results_too() -> None:
    second = {"role": "tool", "name": "now", "content": "noon"}
    messages = [*history("{}")[1:], second, {"role": "user", "content": "So?"}]
    found, _ = with_tools(PLAIN, messages, [TOOL])
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert found[-1]["content"] == 'Result of weather: {"sky": "blue"}\nResult of now: noon\nSo?'


def test_a_history_stays_readable_where_no_tools_are_given() -> None:
    messages, _ = with_tools(PLAIN, history("{}")[1:])
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize("arguments", ["{", "[]", '"text"', 3])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[2\]\.tool_calls\[0\].*no JSON object"):
        with_tools(PLAIN, history(arguments))


def test_a_result_of_no_call_is_refused() -> None:
    messages = [{"role": "tool", "tool_call_id": "call_9", "content": "x"}]
    with pytest.raises(RequestError, match=r"'call_9', and no message before it has a call"):
        with_tools(PLAIN, messages)


def test_a_model_may_have_a_template_of_its_own_for_tools() -> None:
    named = [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": HERMES},
    ]
    assert template_format(ChatTemplate(named, {})).name == "hermes"


PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|system|>' + message['content'] + '<|tool|>' + "
    "message['tools'] + '<|/tool|><|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("said", ["Be brief.", None])
def test_tools_may_stand_in_the_systems_message(said: str | None) -> None:
    template = ChatTemplate(PHI, {})
    assert template_format(template).name == "phi"
    system = [] if said is None else [{"role": "system", "content": said}]
    messages, given = with_tools(template, [*system, {"role": "user", "content": "Hi"}], [TOOL])
    told = f"[{json.dumps(dict(TOOL.as_given()['function']))}]"
    expected = f"<|system|>{said or ''}<|tool|>{told}<|/tool|><|end|><|user|>Hi<|end|>"
    assert template.render(messages, tools=given) == expected
    messages, given = with_tools(template, [{"role": "user", "content": "Hi"}], [])
    assert template.render(messages, tools=given) == "<|user|>Hi<|end|>"
