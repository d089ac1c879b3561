from __future__ import annotations

import json
import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.artifact.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object
from edge_memllm.errors import ArtifactError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" " * (MAX_JSON_BYTES + 1), "here: 1048577 bytes of JSON, the limit is 1048576"),
        (b'{"a": "\xff"}', "here: not valid JSON .*utf-8"),
        (b'{"a": 1', "here: not valid JSON"),
        (b'{"a": 1} x', "here: not valid JSON .*Extra data"),
        (b"", "here: not valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "key 'c' appears twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "a number is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "here: not valid JSON"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "here: the JSON is nested too deeply"),
        (b'{"a": ' * 100_000, "here: the JSON is nested too deeply"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "here: the JSON is nested too deeply"),
        (b'{"a": ["\\ud800"]}', r"here: the text '\\ud800' is not Unicode: half of a surrogate"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"[]", "here: found a list of 0, expected a JSON object"),
        (b'"text"', "here: found 'text', expected a JSON object"),
        (b"null", "here: found null, expected"),
    ],
)
def test_refuses(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse_json_object(data, "here")


def test_pairs_of_surrogates_and_some_nesting_are_fine() -> None:
    data = b'{"a\\ud83d\\ude00": ' + b"[" * 60 + b'"\\ud83d\\ude00"' + b"]" * 60 + b"}"
    assert list(parse_json_object(data, "here")) == ["a\U0001f600"]


def test_message_stays_short_whatever_the_file_holds() -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_json_object(json.dumps("x" * 100_000).encode(), "here")
    assert len(str(caught.value)) < 200


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    with suppress(ArtifactError):
        assert isinstance(parse_json_object(data, "here"), dict)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "here: found a list of 0, expected an object"),
        ({"a": 1}, "here: key 'b' is missing. Export the model again"),
        ({"a": 1, "b": 2, "c\n": 3}, r"here: unknown key 'c\\n'. Upgrade edge-memllm"),
    ],
)
def test_keys_must_be_exact(value: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        exact_fields(value, "here", ("a", "b"))


@pytest.mark.parametrize(
    ("method", "value", "expected"),
    [
        ("integer", True, "a is true, expected an integer from 0 to 9"),
        ("integer", 1.0, "a is 1.0, expected an integer"),
        ("integer", 10, "a is 10, expected an integer"),
        ("integer", -1, "a is -1, expected an integer"),
        ("integer", 1 << 64, "a is an integer beyond 64 bits, expected"),
        ("integer", "1", "a is '1', expected an integer"),
        ("integer", None, "a is null, expected an integer"),
        ("optional_integer", False, "a is false, expected an integer"),
        ("integers", 3, "a is 3, expected a list"),
        ("integers", [0, [1]], "a is a list of 1, expected an integer"),
    ],
)
def test_integers_are_strict(method: str, value: object, expected: str) -> None:
    with pytest.raises(ArtifactError, match=f"^here: {expected}"):
        getattr(exact_fields({"a": value}, "here", ("a",)), method)("a", 0, 9)


@pytest.mark.parametrize("value", [True, "1", None, 11, -10.5, {}, 10**400])
def test_numbers_are_strict(value: object) -> None:
    with pytest.raises(ArtifactError, match="expected a number from -10 to 10"):
        exact_fields({"a": [1, value]}, "here", ("a",)).numbers("a", -10, 10)


def test_texts_choices_and_objects_are_strict() -> None:
    fields = exact_fields({"a": {}, "b": "x", "c": [], "d": "x\n"}, "here", "abcd")
    with pytest.raises(ArtifactError, match="here: a is an object, expected a letter"):
        fields.text("a", re.compile("[a-z]"), "a letter")
    with pytest.raises(ArtifactError, match=r"here: d is 'x\\n', expected a letter"):
        fields.optional_text("d", re.compile("[a-z]"), "a letter")
    with pytest.raises(ArtifactError, match="here: b is 'x', expected one of y, z"):
        fields.choice("b", ("y", "z"))
    with pytest.raises(ArtifactError, match="here: c is a list of 0, expected one of y"):
        fields.choice("c", ("y",))
    with pytest.raises(ArtifactError, match="here: b is 'x', expected an object"):
        fields.mapping("b")


def test_right_values_are_returned() -> None:
    value = {"a": 3, "b": None, "c": [1, 2.5], "d": "x", "e": {"f": 1}}
    fields = exact_fields(value, "here", "abcde")
    assert fields.integer("a", 3, 3) == 3
    assert fields.optional_integer("b", 0, 1) is None
    assert fields.numbers("c", -10, 10) == (1.0, 2.5)
    assert fields.optional_text("b", re.compile("."), "a letter") is None
    assert fields.choice("d", ("x",)) == "x"
    assert fields.mapping("e") == {"f": 1}
