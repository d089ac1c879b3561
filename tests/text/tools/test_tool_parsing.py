"""Calls out of replies: each format, cut into any pieces, and text that is only nearly a call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.text.tools import ToolCall, ToolCallParser, ToolFormat, format_of, parsed_reply
from edge_memllm.text.tools.formats import (
    FUNCTION_GEMMA,
    GEMMA,
    GENERIC,
    HERMES,
    LLAMA,
    QWEN_CODER,
)
from edge_memllm.text.tools.gemma_values import read_object
from edge_memllm.text.tools.parameters import read_parameters
from edge_memllm.text.tools.parsing import CallArguments, collected

NAMES = ("weather", "add")
MISTRAL = format_of("{{ tools }}[TOOL_CALLS] [")
MISTRAL_NAMED = format_of("{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]")
FORMATS = {
    "hermes": HERMES,
    "llama": LLAMA,
    "generic": GENERIC,
    "mistral": MISTRAL,
    "mistral named": MISTRAL_NAMED,
    "gemma": GEMMA,
    "function gemma": FUNCTION_GEMMA,
    "qwen coder": QWEN_CODER,
    "deepseek": format_of("{{ tools }}<｜tool▁calls▁begin｜>"),  # noqa: RUF001
    "deepseek fenced": format_of("{{ tools }}<｜tool▁calls▁begin｜>```json"),  # noqa: RUF001
    "phi": format_of("{{ message['tools'] }}<|tool|><|/tool|>"),
    "granite": format_of("{{ tools }}<|tool_call|>"),
}
PARIS, SUM = ToolCall("weather", '{"city": "Paris"}'), ToolCall("add", '{"a": 1, "b": {"c": "}"}}')


@pytest.mark.parametrize(
    ("name", "text", "said", "calls"),
    [
        (
            "hermes",
            (
                'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
                "</tool_call>\n<tool_call>\n"
                '{"name": "add", "arguments": {"a": 1, "b": {"c": "}"}}}\n</tool_call>\n'
            ),
            "Let me see.",
            [PARIS, SUM],
        ),
        (
            "hermes",
            (
                '<tool_call>[{"name":"weather","parameters":{"city": "Paris"}},'
                '{"type": "function", "function": "add", "arguments": {"a": 1, "b": {"c": "}"}}}]'
                "</tool_call> Done."
            ),
            "Done.",
            [PARIS, SUM],
        ),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}', "", [PARIS]),
        ("llama", '{"name": "weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        (
            "llama",
            (
                '<|python_tag|>{"type": "function", "name": "weather", "parameters": '
                '{"city": "Paris"}}; {"name": "add", "parameters": {"a": 1, "b": {"c": "}"}}}'
            ),
            "",
            [PARIS, SUM],
        ),
        (
            "generic",
            (
                '```json\n[{"name": "weather", "arguments": {"city": "Paris"}},\n'
                '{"name": "add", "arguments": {"a": 1, "b": {"c": "}"}}}]\n```'
            ),
            "",
            [PARIS, SUM],
        ),
        (
            "generic",
            '\n{"name": "weather", "arguments": {"city": "Paris"}}\nThat is it.',
            "That is it.",
            [PARIS],
        ),
        (
            "mistral",
            (
                'Wait.[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, '
                '"id": "abc123def"}, {"name": "add", "arguments": {"a": 1, "b": {"c": "}"}}}]'
            ),
            "Wait.",
            [PARIS, SUM],
        ),
        (
            "mistral named",
            (
                '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]'
                '{"a": 1, "b": {"c": "}"}}'
            ),
            "",
            [PARIS, SUM],
        ),
        (
            "gemma",
            (
                'So:\n<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
                '<|tool_call>call:add{a:1,b:{c:<|"|>}<|"|>}}<tool_call|>'
            ),
            "So:",
            [PARIS, SUM],
        ),
        (
            "function gemma",
            "<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>",
            "",
            [PARIS],
        ),
        # As the model cards and the templates of llama.cpp write them.
        (
            "qwen coder",
            (
                "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
                "</function>\n</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n"
                "</parameter>\n</function>\n</tool_call>"
            ),
            "I look.",
            [PARIS, PARIS],
        ),
        (
            "qwen coder",
            "<function=weather><parameter=city>Paris</parameter></function></tool_call> Done.",
            "Done.",
            [PARIS],
        ),
        (
            "deepseek fenced",
            (
                "So:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"  # noqa: RUF001
                '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'  # noqa: RUF001
                '<｜tool▁sep｜>add\n```json\n{"a": 1, "b": {"c": "}"}}\n```<｜tool▁call▁end｜>'  # noqa: RUF001
                "<｜tool▁calls▁end｜>"  # noqa: RUF001
            ),
            "So:",
            [PARIS, SUM],
        ),
        (
            "deepseek",
            (
                '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}'  # noqa: RUF001
                "<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"  # noqa: RUF001
                '{"a": 1, "b": {"c": "}"}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'  # noqa: RUF001
            ),
            "",
            [PARIS, SUM],
        ),
        (
            "phi",
            (
                '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}, '
                '{"name": "add", "arguments": {"a": 1, "b": {"c": "}"}}}]<|/tool_call|>'
            ),
            "",
            [PARIS, SUM],
        ),
        ("phi", 'functools[{"name": "weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
        ("granite", '<|tool_call|>[{"name":"weather","arguments":{"city": "Paris"}}]', "", [PARIS]),
    ],
)
def test_calls_are_read_in_each_format(
    name: str, text: str, said: str, calls: list[ToolCall]
) -> None:
    assert parsed_reply(FORMATS[name], NAMES, text) == (said, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "a <tool_call> is how a tool is called"),
        ("hermes", '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {oh no}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Par'),
        ("hermes", '<tool_call>\n{"name": "weather", "argum'),
        ("hermes", "a < b <tool_ca"),
        ("llama", '{"name": "Paris", "parameters": "many"}'),
        ("llama", 'As JSON: {"name": "weather", "parameters": {}}'),
        ("generic", '{"answer": {"name": "weather"}}'),
        ("generic", "  {  "),
        ("mistral", "[TOOL_CALLS] are what they are"),
        ("gemma", '<|tool_call>call:weather{city:<|"|>Paris}<tool_call|>'),
        ("qwen coder", "<tool_call>\n<function=weather>\n<parameter=city>\nPar"),
        ("qwen coder", "<tool_call>\n<function=weather>\nin Paris\n</function>\n</tool_call>"),
        ("qwen coder", "<tool_call>\n<function=nobody>\n</function>\n</tool_call>"),
        ("deepseek", "<｜tool▁calls▁begin｜> is a mark"),  # noqa: RUF001
        ("phi", "functools is a module"),
        ("gemma", '<|tool_call>call:weather{city:<|"|>Paris<|"|>}'),
    ],
)
def test_what_is_nearly_a_call_stays_text(name: str, text: str) -> None:
    assert parsed_reply(FORMATS[name], NAMES, text) == (text, [])


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "\n", " ", "{", "}", "[", "]", ",", ";", ":", '"', "\\",
    '{"name": "weather", "arguments": {', '{"name": "add", "parameters": ', '"city": "Paris"',
    '{"type": "function", ', "<|python_tag|>", "[TOOL_CALLS]", "weather", "[ARGS]", "```json",
    "<tool_call>\n<function=add>", "<parameter=a>", "</parameter>", "</function>", "functools[",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{",  # noqa: RUF001
    "<|tool_call>call:add{", "a:1", '<|"|>', "<tool_call|>", "x", "text",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.booleans(),
    st.data(),
)
def test_any_pieces_give_what_the_whole_gives(
    name: str, text: str, certain: bool, data: st.DataObject
) -> None:
    def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
        parser = ToolCallParser(FORMATS[name], NAMES, certain=certain)
        events = [event for piece in pieces for event in parser.push(piece)]
        return collected([*events, *parser.flush()])

    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    assert read(pieces) == read([text]) == read(list(text))


def collections(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)


SCALARS = st.none() | st.booleans() | st.integers(-9999, 9999) | st.text(max_size=12)
JSON = st.recursive(SCALARS, collections, max_leaves=8)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=4)


def written(format: ToolFormat, calls: list[tuple[str, Any]]) -> str:
    spelling = format.spelling
    texts = (f"{spelling.head(name)}{json.dumps(value)}{spelling.closed}" for name, value in calls)
    return spelling.begin + spelling.between.join(texts) + spelling.end


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.sampled_from(NAMES), OBJECTS), min_size=1, max_size=3),
    st.booleans(),
)
def test_what_a_format_spells_is_what_it_reads(
    name: str, calls: list[tuple[str, Any]], certain: bool
) -> None:
    parser = ToolCallParser(FORMATS[name], NAMES, certain=certain)
    text = written(FORMATS[name], calls)
    events = [event for letter in text for event in parser.push(letter)]
    said, found = collected([*events, *parser.flush()])
    assert said == ""
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


def test_arguments_come_as_they_are_written_where_a_grammar_holds_them() -> None:
    parser = ToolCallParser(HERMES, NAMES, certain=True)
    text = written(HERMES, [("weather", {"city": "Paris"})])
    pieces = [event for letter in text for event in parser.push(letter)]
    arguments = [each.text for each in pieces if isinstance(each, CallArguments)]
    assert len(arguments) == len('{"city": "Paris"}')
    assert "".join(arguments) == '{"city": "Paris"}'


def test_a_reply_of_markers_takes_linear_time() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {' * 4000
    assert parsed_reply(HERMES, NAMES, text) == (text, [])


def gemma_text(value: Any, quote: str) -> str:
    match value:
        case dict():
            members = (f"{key}:{gemma_text(each, quote)}" for key, each in value.items())
            return "{" + ",".join(members) + "}"
        case list():
            return "[" + ",".join(gemma_text(each, quote) for each in value) + "]"
        case str():
            return f"{quote}{value}{quote}"
    return json.dumps(value)


KEYS = st.text("abcdefgh_", min_size=1, max_size=6)
GEMMA_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab {}[],:\n", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, GEMMA_VALUES, max_size=4), st.sampled_from(['<|"|>', "<escape>"]))
def test_arguments_in_gemmas_form_become_json(value: Any, quote: str) -> None:
    found = read_object(gemma_text(value, quote))
    assert found is not None
    assert json.loads(found) == value


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["{", "}", "[", "]", ",", ":", "a", "1", '"', '<|"|>']), max_size=12)
)
def test_whatever_stands_there_is_an_object_or_none(parts: list[str]) -> None:
    found = read_object("".join(parts))
    assert found is None or isinstance(json.loads(found), dict)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, "generic"),
        ("{{ messages }}", "generic"),
        ("{{ tools }}", "generic"),
        ("{% if tools %}<tool_call>", "hermes"),
        ("{% if tools %}<|python_tag|>", "llama"),
        ('{% if tools %}{"name": ..., "parameters": ...}', "llama"),
        ("{% if tools %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|tool_call>call:", "gemma"),
        ("{% if tools %}<start_function_call>", "gemma"),
    ],
)
def test_a_template_implies_a_format(source: str | None, name: str) -> None:
    found = format_of(source)
    assert found.name == name
    assert found.describes == (source is not None and "tools" in source)


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string"},
        "n": {"type": "integer"},
        "share": {"type": "number"},
        "sure": {"type": "boolean"},
        "many": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "unit": {"enum": ["c", "f"]},
        "named": {"$ref": "#/$defs/Unit"},
        "undescribed": {},
    },
}
TEXTS = st.text(max_size=20).filter(lambda text: "</" not in text)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "code": TEXTS,
        "n": st.integers(-9999, 9999),
        "share": st.floats(-9, 9),
        "sure": st.booleans(),
        "many": st.lists(TEXTS, max_size=3),
        "table": st.dictionaries(TEXTS, st.integers(0, 9), max_size=3),
        "either": st.none() | st.sampled_from(["words", "more words"]),
        "unit": st.sampled_from(["c", "f"]),
        "named": st.sampled_from(["c", "f"]),
        "undescribed": TEXTS,
    },
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans())
def test_parameters_in_tags_are_what_their_schema_says(
    values: dict[str, Any], python: bool
) -> None:
    def spelt(value: Any) -> str:
        if isinstance(value, str):
            return value
        return str(value) if python and isinstance(value, bool | None) else json.dumps(value)

    tags = "".join(f"<parameter={k}>\n{spelt(v)}\n</parameter>\n" for k, v in values.items())
    found = read_parameters(f"\n{tags}", PARAMETERS)
    assert found is not None
    assert json.loads(found) == values
