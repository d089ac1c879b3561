"""What lets JSON end: objects that are closed, numbers that are short, loops that are left."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_memllm import RequestError
from edge_memllm.engine.grammar import Grammars
from edge_memllm.engine.json_ending import MOST_DIGITS, closed
from edge_memllm.engine.response_format import ResponseFormat, choice
from edge_memllm.sampling import LeaningConstraint, Sampler, Sampling
from support.checkpoints import EOS, VOCABULARY
from support.small_model import IDENTITY, byte_tokenizer, model_spec

TOKENIZER = byte_tokenizer()
SPEC = dataclasses.replace(model_spec(IDENTITY, 0, 2, 64, VOCABULARY), eos_token_ids=(EOS,))
GRAMMARS = Grammars(TOKENIZER, SPEC)
BYTES = {TOKENIZER.decode([token]): token for token in range(VOCABULARY)}
NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}}


def written(form: ResponseFormat, wish: str, most: int = 2000) -> str | None:
    """Text of a model that wishes to write `wish` over and over, and else what it may; or None."""
    constraint = GRAMMARS.constraints(form)()
    text, tokens = "", 0
    while tokens < most:
        mask = constraint.allowed()
        assert mask is not None
        token = BYTES[wish[len(text) % len(wish)]] if wish else EOS
        if not mask[token]:
            token = int(_first(mask))
        constraint.advance(token)
        if token == EOS:
            return text
        text += TOKENIZER.decode([token])
        tokens += 1
    return None


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(mask)[0])


@pytest.mark.parametrize(
    ("schema", "strict", "expected"),
    [
        (NAMED, False, {**NAMED, "additionalProperties": False}),
        ({**NAMED, "additionalProperties": True}, False, {**NAMED, "additionalProperties": True}),
        ({**NAMED, "additionalProperties": True}, True, {**NAMED, "additionalProperties": False}),
        ({"type": "object"}, True, {"type": "object"}),
        ({"items": NAMED}, False, {"items": {**NAMED, "additionalProperties": False}}),
        (
            {"anyOf": [NAMED, {"type": "null"}]},
            False,
            {"anyOf": [{**NAMED, "additionalProperties": False}, {"type": "null"}]},
        ),
        ({"allOf": [NAMED, {"properties": {"b": {}}}]}, True, None),
        ({"$defs": {"A": NAMED}, "$ref": "#/$defs/A", "properties": {"b": {}}}, False, None),
        (
            {"$defs": {"A": NAMED}, "$ref": "#/$defs/A"},
            False,
            {"$defs": {"A": {**NAMED, "additionalProperties": False}}, "$ref": "#/$defs/A"},
        ),
        ({"enum": [{"properties": {"b": 1}}]}, True, None),
        ({"properties": {"properties": {"type": "string"}}, "additionalProperties": {}}, 0, None),
        (
            {**NAMED, "required": ["a", "b"]},
            False,
            {
                "type": "object",
                "properties": {**NAMED["properties"], "b": {}},
                "additionalProperties": False,
                "required": ["a", "b"],
            },
        ),
        (True, False, True),
    ],
)
def test_objects_with_names_have_no_others(schema: Any, strict: bool, expected: Any) -> None:
    given = json.dumps(schema)
    assert closed(schema, strict=strict) == (schema if expected is None else expected)
    assert json.dumps(schema) == given  # a caller's own is left as it is


def test_a_property_may_be_called_properties() -> None:
    schema = {"properties": {"properties": NAMED, "items": {"enum": [NAMED]}}}
    inner = {**NAMED, "additionalProperties": False}
    assert closed(schema)["properties"] == {"properties": inner, "items": {"enum": [NAMED]}}


_LEAVES = st.sampled_from(
    [{"type": "integer"}, {"type": "boolean"}, {"enum": ["x", "y"]}, {"type": "null"}]
)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            },
            optional={"required": st.lists(st.sampled_from("ab"), max_size=2, unique=True)},
        ),
        st.builds(lambda each: {"type": "array", "items": each, "maxItems": 2}, inner),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, _LEAVES),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(_SCHEMAS, st.booleans(), st.randoms(use_true_random=False))
def test_what_is_written_fits_the_schema_as_it_was(schema: Any, strict: bool, random: Any) -> None:
    form = ResponseFormat("json_schema", json.dumps(closed(schema, strict=strict)), strict)
    constraint = GRAMMARS.constraints(form)()
    tokens: list[int] = []
    while (token := int(random.choice(np.flatnonzero(constraint.allowed())))) != EOS:
        constraint.advance(token)
        tokens.append(token)
        assert len(tokens) < 3000
    assert jsonschema_rs.is_valid(schema, json.loads(TOKENIZER.decode(tokens)))


@pytest.mark.parametrize(
    ("schema", "wish"),
    [
        ({"type": "integer"}, "1"),
        ({"type": "number"}, "1"),
        ({"type": "number"}, "0.1111111111111111111111111"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0." + "1" * 60),
        ({"type": "number"}, "1e99999999999999999999999999"),
    ],
)
def test_numbers_have_so_many_digits(schema: dict[str, Any], wish: str) -> None:
    text = written(ResponseFormat.schema(schema), wish)
    assert text is not None
    assert max(map(len, re.findall(r"\d+", text))) <= MOST_DIGITS
    assert abs(float(text)) < float("inf")


def test_a_number_that_the_schema_wants_longer_is() -> None:
    form = ResponseFormat.schema({"type": "integer", "minimum": 10**17, "maximum": 10**18 - 1})
    assert written(form, "1") == "1" * 18


@pytest.mark.parametrize(
    ("schema", "wish", "most"),
    [
        ({"type": "string"}, '"' + "ha" * 2000, 200),
        ({"type": "array", "items": {"type": "string"}}, '["ha", ' + '"ha", ' * 2000, 200),
        ({"type": "array", "items": {"type": "integer"}}, "[" + "0, " * 2000, 200),
        ({"type": "array", "items": NAMED}, "[" + '{"a": 1}, ' * 2000, 400),
        ({"type": "object"}, "{" + '"a": {' * 2000, 400),
    ],
)
def test_a_text_that_goes_round_in_circles_ends(
    schema: dict[str, Any], wish: str, most: int
) -> None:
    text = written(ResponseFormat.schema(schema), wish)
    assert text is not None
    assert 64 < len(text) < most
    assert jsonschema_rs.is_valid(schema, json.loads(text))


def test_a_string_of_few_words_in_any_order_ends() -> None:
    random = np.random.default_rng(0)
    wish = '"' + "".join(random.choice(list("abcdef"), 2000))
    text = written(ResponseFormat.schema({"type": "string"}), wish)
    assert text is not None
    assert 90 < len(text) < 110


def test_digits_in_a_string_are_no_loop() -> None:
    random = np.random.default_rng(0)
    wish = '"' + "".join(random.choice(list("0123456789"), 300)) + '"'
    assert written(ResponseFormat.schema({"type": "string"}), wish) == wish


def bias_behind(schema: dict[str, Any], text: str) -> dict[str, float]:
    """What is added behind a text to the logits of tokens, by their texts."""
    constraint = GRAMMARS.constraints(ResponseFormat.schema(schema))()
    for letter in text:
        constraint.advance(BYTES[letter])
    assert isinstance(constraint, LeaningConstraint)
    bias = constraint.bias()
    found = np.zeros(VOCABULARY) if bias is None else bias
    return {TOKENIZER.decode([int(token)]): float(found[token]) for token in np.flatnonzero(found)}


@pytest.mark.parametrize(
    ("count", "expected"),
    [(64, {}), (74, {'"': 0.2}), (1000, {'"': 6.0})],
)
def test_the_end_of_a_long_string_is_likelier(count: int, expected: dict[str, float]) -> None:
    random = np.random.default_rng(0)
    text = '"' + "".join(random.choice([chr(each) for each in range(97, 123)], count))
    assert bias_behind({"type": "string"}, text) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "expected"), [(8, {}), (10, {",": -0.5}), (99, {",": -6.0})])
def test_another_item_of_a_long_array_is_less_likely(
    count: int, expected: dict[str, float]
) -> None:
    text = json.dumps([*range(count)])[:-1]
    schema = {"type": "array", "items": {"type": "integer"}}
    assert bias_behind(schema, text) == pytest.approx(expected)


def test_the_sampler_takes_a_constraints_bias() -> None:
    class Leaning:
        def allowed(self) -> None:
            return None

        def advance(self, token: int) -> None:
            pass

        def bias(self) -> Any:
            return np.array([0, 5, 0], np.float32)

    sampler = Sampler(Sampling(), 1, constraint=Leaning())
    assert sampler.pick(np.array([1, 0, 2], np.float32)) == 1


def test_a_loop_that_the_schema_wants_is_left_alone() -> None:
    schema = {"type": "array", "items": {"const": 0}, "minItems": 60, "maxItems": 60}
    assert written(ResponseFormat.schema(schema), "[" + "0, " * 2000) == json.dumps([0] * 60)


def test_a_text_that_repeats_itself_a_little_is_left_alone() -> None:
    wish = json.dumps({"row": [0] * 20, "laugh": "ha" * 30})
    form = ResponseFormat.schema({"type": "object"})
    assert written(form, wish) == wish


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (ResponseFormat("regex", "[a-c]{2}"), "ab"),
        (ResponseFormat("grammar", 'start: "a" "b"'), "ab"),
        (ResponseFormat("grammar", 'root ::= "a" [b-c]'), "ab"),
        (choice(["ab", 'a"\\b']), "ab"),
    ],
)
def test_other_forms_are_kept_to(form: ResponseFormat, expected: str) -> None:
    assert written(form, "ab") == expected


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (ResponseFormat("regex", "[a-"), "the regular expression cannot be kept to: "),
        (ResponseFormat("grammar", "start: missing"), "the grammar cannot be kept to: "),
        (ResponseFormat("grammar", "root ::= ("), "it is neither Lark nor GBNF"),
    ],
)
def test_a_form_that_is_none_is_refused(form: ResponseFormat, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GRAMMARS.constraints(form)


class Person:
    """As pydantic's classes say what they accept."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return NAMED


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat("json_object")),
        (NAMED, ResponseFormat.schema(NAMED)),
        (Person, ResponseFormat.schema(NAMED)),
        (
            {"type": "json_schema", "json_schema": {"schema": NAMED, "strict": True}},
            ResponseFormat.schema(NAMED, strict=True),
        ),
        ({"type": "regex", "regex": "a+"}, ResponseFormat("regex", "a+")),
        ({"type": "grammar", "grammar": 'start: "a"'}, ResponseFormat("grammar", 'start: "a"')),
    ],
)
def test_forms_are_asked_for_in_openais_words(value: object, expected: object) -> None:
    assert ResponseFormat.of(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", "response_format is 'json', expected a JSON schema"),
        ({"type": "json_schema"}, "response_format.json_schema is None, expected an object with"),
        ({"type": "regex"}, "response_format.regex is None, expected text"),
        ({"type": "object", "enum": {1}}, "the schema is no JSON"),
    ],
)
def test_what_is_no_form_is_refused(value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ResponseFormat.of(value)
