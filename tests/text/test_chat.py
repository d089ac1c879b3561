"""Chat templates: rendered as transformers renders them, refused where it refuses, and bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.text.chat import MAX_TEMPLATE_BYTES, ChatTemplate
from edge_memllm.text.tokenization import Tokenizer
from support.small_model import write_small_artifact

MESSAGES = [{"role": "user", "content": "Hi"}]
SYSTEM = {"role": "system", "content": "Be <brief> & \"kind\" — 'so'."}
QUESTION = {"role": "user", "content": "  Où est\n<東京>? 🙂 "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThere.  "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "x1", "function": {"name": "find", "arguments": {"place": "東京", "n": 2}}}
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <places> & more",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [QUESTION],
    [SYSTEM, QUESTION],
    [SYSTEM, QUESTION, ANSWER, QUESTION],
    [QUESTION, ANSWER],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [QUESTION, {"role": "assistant", "content": "x", "reasoning": "why"}, QUESTION],
    [QUESTION, CALL, {"role": "tool", "content": "[1]", "name": "find"}],
    [QUESTION, QUESTION],
    [{"role": "wizard", "content": "x"}],
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"documents": [{"title": "T", "text": "<é>"}]},
    {"enable_thinking": False},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}

TEMPLATES = {
    "turns": """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
""",
    "alternation": """
{% if messages[0].role == 'system' %}
    {% set said = messages[0].content | trim + '\\n\\n' %}{% set rest = messages[1:] %}
{% else %}
    {% set said = '' %}{% set rest = messages %}
{% endif %}
{% for m in rest %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: ' ~ m.role ~ ' at ' ~ loop.index) }}
{% endif %}
[{{ loop.index }}{{ ' last' if loop.last }}] {{ (said if loop.first else '') + m.content | trim }}
{% endfor %}
""",
    "generation": """
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m.content }}|{% endif %}
{%- endfor %}
""",
    "tools": """
{%- if tools is not none and tools %}{% for t in tools %}{{ t | tojson(indent=2) }}
{{ t.function | tojson }} {{ t | tojson(sort_keys=true, separators=(',', ':')) }}
{{ t | tojson(ensure_ascii=True) }}{% endfor %}{% elif tools is none %}no tools{% endif %}
{%- if documents is none %}, no documents{% else %}{{ documents | tojson }}{% endif %}
{%- for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}
{%- for key, value in c.function.arguments | items %} {{ key }}={{ value | tojson }}{% endfor %}
{%- endfor %}{{ m.content is defined }}{% endfor %}
""",
    "thinking": """
{%- set ns = namespace(last=-1, seen=[]) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- set ns.seen = ns.seen + [m.role] %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'wizard' %}{% continue %}{% endif %}
    {%- set text = m.content if m.content is string else m.content | map(attribute='text') | join %}
    {%- if '</think>' in text and loop.index0 < ns.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- m.role ~ ': ' ~ text }}{{ ' (' + m.thinking + ')' if m.reasoning_content is defined }}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}
{{- ns.seen | unique | sort | join('/') }}
{%- if not enable_thinking | default(true) %}<think></think>{% endif %}
""",
    "macros": """
{%- macro shown(value, depth=0) -%}
    {%- if value is mapping -%}
        {% for k, v in value | dictsort %}{{ k }}:{{ shown(v, depth + 1) }};{% endfor %}
    {%- elif value is iterable and value is not string -%}
        [{% for v in value %}{{ shown(v, depth + 1) }}{{ ',' if not loop.last }}{% endfor %}]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- macro boxed() %}<{{ caller('!') }}>{% endmacro -%}
{% call(mark) boxed() %}{{ shown(messages) }}{{ mark }}{% endcall %}
{{ '%s has %05.1f' | format(messages[0].role, 3.14159) }} {{ '{:>6}|{}'.format('ab', 1) }}
{{ (messages | selectattr('role', 'equalto', 'user') | list | length) ** 2 // 3 % 5 }}
{{ messages | map(attribute='role') | map('upper') | list }} {{ 'a,b'.split(',') | last }}
{{ [3, 1, 2] | sort | first }} {{ range(4) | batch(3, 'x') | list }} {{ {'a': [1, (2, none)]} }}
{% set block %}a{{ 1 < 2 <= 2 }}b{% endset %}{{ block | replace('a', 'cc') | indent(2, true) }}
{% filter upper %}x{{ 'y' * 3 }}{% endfilter %} {{ [1, 2] + [3] }} {{ -3 | abs }} {{ 7 / 2 }}
{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}
{% for a, b in {'x': 1}.items() if b %}{{ loop.cycle('o', 'e') }}{{ a }}{% else %}none{% endfor %}
""",
    "dates": "{{ strftime_now('%Y-%m') }} {{ image_token }} {{ undefined_name }}{{ dict(a=1).a }}",
    "wrong use": "{{ messages[0].content + 1 }}",
    "changing": "{% set _ = messages.append(1) %}",
    "private": "{% set ns = namespace(_x=1) %}{{ ns }}",
    "no method": "{{ messages[0].content.nothing() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    from transformers.utils import chat_template_utils as theirs

    if not hasattr(theirs, "_normalize_chat_messages"):
        pytest.skip("this older transformers leaves to a template what the reference drops")
    template, rendered = ChatTemplate(TEMPLATES[name], TOKENS), 0
    for messages, extra, way in product(CONVERSATIONS, EXTRAS, ("answer", "end", "go on")):
        prompt, go_on = way == "answer", way == "go on"
        try:
            ((expected,), _) = theirs.render_jinja_template(
                [theirs._normalize_chat_messages(messages)],
                chat_template=TEMPLATES[name],
                add_generation_prompt=prompt,
                continue_final_message=go_on,
                **{**TOKENS, **extra},
            )
        except Exception:
            with pytest.raises(RequestError):
                render(template, messages, prompt, go_on, extra)
            continue
        assert render(template, messages, prompt, go_on, extra) == expected
        rendered += 1
    assert bool(rendered) != (name in ("wrong use", "changing", "private", "no method"))


def render(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    prompt: bool,
    go_on: bool,
    extra: dict[str, Any],
) -> str:
    return template.render(
        messages, add_generation_prompt=prompt, continue_final_message=go_on, **extra
    )


def test_a_final_message_is_answered_or_gone_on_with() -> None:
    template = ChatTemplate("{{ messages[-1].content }}", {})
    with pytest.raises(RequestError, match="give one of continue_final_message and add_gen"):
        template.render(MESSAGES, continue_final_message=True)
    with pytest.raises(RequestError, match="has no content to go on with"):
        render(template, [{"role": "user"}], False, True, {})
    with pytest.raises(RequestError, match="has no text to go on with"):
        render(template, [{"role": "user", "content": [{"type": "image"}]}], False, True, {})
    silent = ChatTemplate("{{ messages[-1].role }}{# content #}", {})
    with pytest.raises(RequestError, match="leaves out the final message"):
        render(silent, MESSAGES, False, True, {})


def test_what_is_no_chat_is_refused() -> None:
    template = ChatTemplate("x", {})
    with pytest.raises(RequestError, match="no messages, expected one at least"):
        template.render([])
    with pytest.raises(RequestError, match="a message is a str, expected an object"):
        template.render(["Hi"])  # type: ignore[list-item]


def test_only_plain_values_reach_a_template() -> None:
    class Loud(str):
        def shout(self) -> str:
            return self.upper()

    template = ChatTemplate(
        "{{ messages[0].content }}{{ thing }}{{ messages[0].content.shout }}", {}
    )
    assert template.render([{"role": "user", "content": Loud("a")}], thing=object()) == "a<object>"


def test_a_model_may_have_several_templates() -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }} tools"},
    ]
    template = ChatTemplate(named, {})
    template.check()
    assert template.source == "plain"
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=TOOLS) == "with 1 tools"
    with pytest.raises(RequestError, match="has tool_use, expected one named default"):
        ChatTemplate(named[1:], {}).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * (MAX_TEMPLATE_BYTES + 1), "65537 bytes, expected at most 65536"),
        ("{% if %}", "not valid Jinja"),
        ("{{" + "(" * 5000 + "}}", "not valid Jinja"),
        (["a", "b"], "a list, expected one text, or a list of objects with name and template"),
        ([{"name": "default", "template": "{{"}], "not valid Jinja"),
        ([{"name": "b", "template": "{{"}], "chat template 'b': not valid Jinja"),
        (b"\xff", "not UTF-8 text"),
        ("\ud800", "not UTF-8 text"),
    ],
)
def test_a_wrong_template_ends_chat_only(source: object, message: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(ArtifactError, match=message):
        template.check()
    if not isinstance(source, list) or source[0] != {"name": "b", "template": "{{"}:
        with pytest.raises(RequestError, match=f"This model cannot chat.*{message}"):
            template.render(MESSAGES)


def test_a_model_with_a_wrong_template_loads(tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a", chat_template__jinja=b"{% nonsense %}")
    with Artifact.open(made.path) as artifact:
        tokenizer = Tokenizer.from_artifact(artifact)
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
    assert tokenizer.chat_template is not None
    with pytest.raises(RequestError, match=r"cannot chat\. chat template: not valid Jinja"):
        tokenizer.chat_template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'a' %}",
    ],
)
def test_a_template_can_refuse_but_not_escape(source: str) -> None:
    with pytest.raises(RequestError, match="The chat template refuses these messages"):
        ChatTemplate(source, {}).render(MESSAGES)


def grown(start: str, step: str, shown: str = "{{ ns.x | string }}") -> str:
    """A value that gets larger sixty times."""
    loop = "{% for i in range(60) %}{% set ns.x = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + start + ") %}" + loop + shown


HOSTILE = [
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}" + "many words " * 900 + "{% endfor %}",
    "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% for i in range(9999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{% for i in range(9999) %}{{ range(99999) | select('odd') | list | last }}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * [1] }}",
    "{{ ('a' | safe) * 10 ** 9 }}",
    grown("'aaaa'", "ns.x ~ ns.x"),
    grown("'aaaa'", "ns.x + ns.x"),
    grown("[1]", "ns.x + ns.x"),
    grown("[1]", "[ns.x, ns.x]"),
    grown("[1]", "(ns.x, ns.x)"),
    grown("[1]", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
    grown("3", "ns.x * ns.x"),
    grown("'a'", "ns.x | replace('a', 'aa')"),
    grown("'a'", "[ns.x, ns.x] | join"),
    grown("'a'", "'%s%s' % (ns.x, ns.x)"),
    grown("'a'", "'{0}{0}'.format(ns.x)"),
    grown("'a'", "caller", "").replace("caller", "'' ~ ns.x ~ ns.x ~ ns.x"),
    "{% set a = namespace() %}{% set b = namespace(x=[a] * 99) %}{{ [b] }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% if 9 ** 99999999 %}{% endif %}",
    "{% set x = 10 ** 100000 %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%-1000000000d' | format(1) }}",
    "{{ '%.1000000000f' % 1.5 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(width=1000000000) }}",
    "{{ '\\t'.expandtabs(1000000000) }}",
    "{{ 'a\\nb' | indent(1000000000) }}",
    "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "{{ range(99999) | join('x' * 99999) }}",
    "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{{ ([[1] * 999] * 9999) | sum(start=[]) }}",
    "{{ [[1]] | tojson(indent=1000000000) }}",
    "{{ ([1] * 99999) | tojson(separators=('x' * 99999, ':')) }}",
    "{{ ('.' * 99999 ~ 'a') | urlize }}",
    "{{ ('<a>' * 999999) | striptags }}",
    "{{ ('a ' * 99999) | wordwrap(1, wrapstring='x' * 9999) }}",
    "{{ (5).to_bytes(1000000000, 'big') }}",
    "{{ dict.fromkeys(range(99999), 'a' * 99999) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ ('a ' * 9999999) | title | length }}",
    "{{ ('€' * 9999999) | join }}",
    "{{ strftime_now('%c' * 99999) }}",
    "{% set x = 'a' * 999999 %}{{ " + "~".join(["x"] * 9000) + " }}",
    "{% set x = 'a' * 9999999 %}" + "".join(f"{{% set y{i} = x[1:] %}}" for i in range(999)),
    "{% set x, y = 'a' * 999999, 'a' ~ 'a' * 999998 %}{{ " + "==".join(["x", "y"] * 4000) + " }}",
    "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{{ x is eq 'b' ~ x }}{% endfor %}",
    "{% set x = 'a' * 999999 %}{% for i in range(9999) %}{{ 'b' in x }}{% endfor %}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:60])
def test_a_template_neither_hangs_nor_swells(source: str, memory_limit: None) -> None:
    begin = time.process_time()
    template = ChatTemplate(source, {})
    template.check()
    with pytest.raises(RequestError, match="The chat template refuses these messages"):
        template.render(MESSAGES)
    assert time.process_time() - begin < 8


@pytest.fixture
def memory_limit() -> Iterator[None]:
    """As much memory as there is, and one gigabyte: what swells fails, and does not swap."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def test_a_long_conversation_is_no_attack() -> None:
    template = ChatTemplate(TEMPLATES["thinking"].replace("loop.index > 3", "false"), TOKENS)
    chat = [{"role": role, "content": "word " * 60} for role in ("user", "assistant")] * 1000
    assert len(template.render(chat)) > 500_000
    letter = [{"role": "user", "content": "a letter " * 250_000}]
    assert len(template.render(letter)) > 2_000_000


def test_a_budget_does_not_outlast_a_rendering() -> None:
    template = ChatTemplate("{% for i in range(50000) %}{% endfor %}{{ 'a' * 9000000 }}", {})
    for _ in range(3):
        assert len(template.render(MESSAGES)) == 9_000_000


def test_templates_that_ask_for_the_day_get_todays() -> None:
    source = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    template = ChatTemplate(source + "{{ date_string }}/{{ datetime }}", {})
    today = datetime.now()
    expected = f"{today:%d %b %Y}/{today:%b %d %Y}"
    assert template.render(MESSAGES) == expected
    assert template.render(MESSAGES, date_string="then").startswith("then/")


def test_what_map_gives_is_a_list_as_json() -> None:
    template = ChatTemplate("{{ tools | map(attribute='function') | tojson }}", {})
    text = template.render(MESSAGES, tools=TOOLS)
    assert json.loads(text) == [each["function"] for each in TOOLS]


def test_a_template_may_call_tools_functions() -> None:
    template = ChatTemplate("{{ '' + functions }}", {})
    assert template.render(MESSAGES) == ""
    assert json.loads(template.render(MESSAGES, tools=TOOLS)) == TOOLS
    assert template.render(MESSAGES, functions="f") == "f"
