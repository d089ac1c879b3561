"""What holds a reply to calls: whatever is chosen is a call that fits its schema."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from edge_memllm.engine.grammar import Grammars
from edge_memllm.engine.tool_use import ToolUse
from edge_memllm.sampling import Constraint
from edge_memllm.text.tools import Tool, ToolFormat, format_of, parsed_reply
from edge_memllm.text.tools.formats import DESCRIBED, GEMMA, HERMES, LLAMA, QWEN_CODER
from edge_memllm.text.tools.parsing import collected
from support.checkpoints import EOS, VOCABULARY
from support.small_model import IDENTITY, byte_tokenizer, model_spec

SPEC = dataclasses.replace(model_spec(IDENTITY, 0, 2, 64, VOCABULARY), eos_token_ids=(EOS,))
TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, SPEC)
DEEPSEEK = format_of("{{ tools }}<｜tool▁calls▁begin｜>")  # noqa: RUF001
DEEPSEEK_FENCED = format_of("{{ tools }}<｜tool▁calls▁begin｜>```json")  # noqa: RUF001
PHI = format_of("{{ message['tools'] }}<|tool|><|/tool|>")
UNIT = {"$ref": "#/$defs/Unit"}
WEATHER = Tool(
    "weather",
    parameters={
        "type": "object",
        "properties": {"unit": UNIT, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["unit", "days"],
        "additionalProperties": False,
        "$defs": {"Unit": {"enum": ["c", "f"]}},
    },
)
TOOLS = (WEATHER, Tool("now"))
FORMATS = [
    HERMES,
    LLAMA,
    DESCRIBED,
    GEMMA,
    format_of("{{ tools }}[TOOL_CALLS] ["),
    format_of("{{ tools }}[TOOL_CALLS]x[ARGS]"),
    QWEN_CODER,
    DEEPSEEK,
    DEEPSEEK_FENCED,
    PHI,
]


def constraint_of(use: ToolUse) -> Constraint:
    return use.constraint(GRAMMARS.constraints(use.form(TOKENIZER)), TOKENIZER)()


def written(constraint: Constraint, begin: str = "", seed: int = 0, most: int = 600) -> str:
    """The text of `begin`, and then of anything that is allowed."""
    choose, tokens = random.Random(seed), []
    for token in TOKENIZER.encode(begin, special=False):
        mask = constraint.allowed()
        assert mask is None or mask[token]
        constraint.advance(token)
        tokens.append(token)
    for _ in range(most):
        mask = constraint.allowed()
        assert mask is not None
        token = int(choose.choice(list(np.flatnonzero(mask))))
        constraint.advance(token)
        if token == EOS:
            break
        tokens.append(token)
    return TOKENIZER.decode(tokens)


def check(use: ToolUse, text: str) -> int:
    said, calls = parsed_reply(use.format, {tool.name: tool.schema for tool in use.tools}, text)
    assert said == ""
    for call in calls:
        found = json.loads(call.arguments)
        if call.name == "weather":
            assert found["unit"] in ("c", "f")
            assert 1 <= found["days"] <= 9
        else:
            assert found == {}
    return len(calls)


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_calls_that_must_come_are_calls_whatever_is_chosen(format: ToolFormat) -> None:
    use = ToolUse(format=format, tools=TOOLS, need="required")
    counts = [check(use, written(constraint_of(use), seed=seed)) for seed in range(6)]
    assert min(counts) >= 1
    assert format.most or max(counts) > 1


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_one_call_where_there_may_be_no_more(format: ToolFormat) -> None:
    use = ToolUse(format=format, tools=(WEATHER,), need="required", parallel=False)
    assert [check(use, written(constraint_of(use), seed=seed)) for seed in range(3)] == [1] * 3


@pytest.mark.parametrize(
    ("format", "begin"),
    [
        (HERMES, "Let me see. <tool_call>"),
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"un'),
        (LLAMA, '{"name": "weather'),
        (DESCRIBED, '{"name": "now'),
        (format_of("{{ tools }}[TOOL_CALLS] ["), "[TOOL_CALLS]"),
        (QWEN_CODER, "Sure.\n<tool_call>\n<function=weather>\n<par"),
        (DEEPSEEK, f"Sure.{DEEPSEEK.spelling.begin}"),
        (DEEPSEEK_FENCED, DEEPSEEK_FENCED.spelling.begin + DEEPSEEK_FENCED.spelling.head("now")),
        (PHI, '<|tool_call|>[{"name": "now'),
    ],
)
def test_what_has_begun_as_a_call_becomes_one(format: ToolFormat, begin: str) -> None:
    use = ToolUse(format=format, tools=TOOLS)
    text = written(constraint_of(use), begin)
    _, calls = parsed_reply(format, ["weather", "now"], text)
    assert calls
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize("text", ["Plain words.", '{"name": "Bob"}', "a <tool_ call", "a {"])
@pytest.mark.parametrize("format", [HERMES, LLAMA, DESCRIBED], ids=lambda each: each.name)
def test_text_is_free(format: ToolFormat, text: str) -> None:
    constraint = constraint_of(ToolUse(format=format, tools=TOOLS))
    for token in TOKENIZER.encode(text, special=False):
        assert constraint.allowed() is None
        constraint.advance(token)
    assert constraint.allowed() is None


def test_an_answer_by_a_schema_may_come_in_place_of_calls() -> None:
    answer: dict[str, Any] = {"enum": ["yes", "no"]}
    use = ToolUse(format=HERMES, tools=TOOLS, answer=answer)
    texts = {written(constraint_of(use), seed=seed) for seed in range(12)}
    assert texts & {'"yes"', '"no"'}
    assert any(text.startswith("<tool_call>") for text in texts)


def test_a_number_among_the_arguments_comes_to_its_end() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    use = ToolUse(
        format=HERMES, tools=(Tool("f", parameters=schema),), need="required", parallel=False
    )
    begin = '<tool_call>\n{"name": "f", "arguments": {"n": ' + "1" * 16
    assert written(constraint_of(use), begin) == begin + "}}\n</tool_call>"


def test_special_tokens_of_a_format_are_named_by_their_ids() -> None:
    class Special:
        def special_token(self, text: str) -> int | None:
            return {"[TOOL_CALLS]": 7, "<|eom_id|>": 9}.get(text)

        token = special_token

    tokenizer: Any = Special()
    use = ToolUse(format=format_of("{{ tools }}[TOOL_CALLS]["), tools=TOOLS)
    assert use.shown_tokens(tokenizer) == (7,)
    assert 'calls: <[7]> "[" call' in use.grammar(tokenizer)
    assert ToolUse(format=LLAMA, tools=TOOLS).ends(tokenizer) == (9,)


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "kind": {"$ref": "#/$defs/Kind"},
            "days": {"type": "integer", "minimum": 1, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
            "deep": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "off": {"type": ["null", "boolean"]}},
                "required": [],
            },
        },
        "required": ["kind", "tags"],
        "$defs": {"Kind": {"anyOf": [{"const": "x"}, {"const": ""}, {"const": 3}]}},
    },
    {"type": "object", "properties": {}},
    # What the rules of Gemma's own form do not have is held to as JSON.
    {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^[ab]{2}$"}},
        "required": ["code"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_gemmas_own_form_fits_the_schema_too(schema: dict[str, Any]) -> None:
    use = ToolUse(format=GEMMA, tools=(Tool("f", parameters=schema),), need="required")
    own = 0
    for seed in range(10):
        text = written(constraint_of(use), seed=seed, most=2000)
        _, calls = parsed_reply(GEMMA, ["f"], text)
        assert calls, text
        for call in calls:
            jsonschema_rs.validate(schema, json.loads(call.arguments))
        own += 'call:f{"' not in text
    assert (own == 10) == ("code" not in schema["properties"])


def test_gemmas_own_texts_may_hold_anything_but_a_quote() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    use = ToolUse(
        format=GEMMA, tools=(Tool("f", parameters=schema),), need="required", parallel=False
    )
    text = '<|tool_call>call:f{city:<|"|>a > b, "c" } \n<|"|>}<tool_call|>'
    assert written(constraint_of(use), text) == text
    _, (call,) = parsed_reply(GEMMA, ["f"], text)
    assert json.loads(call.arguments) == {"city": 'a > b, "c" } \n'}


def test_a_text_in_tags_is_any_text_up_to_its_tag() -> None:
    properties = {"code": {"type": "string"}, "n": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["code"]}
    use = ToolUse(
        format=QWEN_CODER,
        tools=(Tool("write", parameters=schema),),
        need="required",
        parallel=False,
    )
    code = 'if (a < b && "c") {\n  return "</div>\\n";\n}\n'
    begin = (
        f"<tool_call>\n<function=write>\n<parameter=code>\n{code}\n</parameter>\n"
        "<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
    )
    text = written(constraint_of(use), begin)
    assert text == begin
    parser = use.parser()
    _, (call,) = collected([*parser.push(text), *parser.flush()])
    assert json.loads(call.arguments) == {"code": code, "n": 3}
    with pytest.raises(AssertionError):  # a number that is none
        written(constraint_of(use), begin.replace("3", "three"))


@pytest.mark.parametrize("bound", [{"pattern": "^a+$"}, {"type": ["string", "integer"]}])
def test_what_tags_have_no_rules_for_is_json(bound: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", **bound}}, "required": ["x"]}
    use = ToolUse(
        format=QWEN_CODER, tools=(Tool("f", parameters=schema),), need="required", parallel=False
    )
    begin = '<tool_call>\n<function=f>\n{"x": "aa"}</function>\n</tool_call>'
    assert written(constraint_of(use), begin) == begin
    _, (call,) = parsed_reply(QWEN_CODER, {"f": schema}, begin)
    assert json.loads(call.arguments) == {"x": "aa"}
