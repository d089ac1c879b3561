"""Forms of replies, under the names of OpenAI, vLLM and llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.service import Service
from support.server import Served, complete, refusal, serving_small

SCHEMA = {"type": "object", "properties": {"on": {"enum": [12]}}, "required": ["on"]}
WRITTEN = '{"on": 12}'


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving_small(folder) as found:
        yield found


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, WRITTEN),
        ({"response_format": {"type": "regex", "regex": "ab?c"}}, "ab?c"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "x" "y"'}}, "xy"),
        ({"json_schema": SCHEMA}, WRITTEN),
        ({"grammar": 'root ::= "x" "y"'}, "xy"),
        ({"guided_json": SCHEMA}, WRITTEN),
        ({"guided_json": json.dumps(SCHEMA)}, WRITTEN),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "x"'}, "x"),
        ({"structured_outputs": {"json": SCHEMA}}, WRITTEN),
        ({"structured_outputs": {"regex": "[a-c]{2}"}}, "[a-c]{2}"),
        ({"structured_outputs": {"choice": ['say "hi"']}}, 'say "hi"'),
        ({"structured_outputs": {"grammar": 'root ::= "x"'}}, "x"),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, "a"),
    ],
)
def test_a_form_is_kept_to(served: Served, fields: dict[str, Any], expected: str) -> None:
    (choice,) = served.complete(max_tokens=60, **fields)["choices"]
    assert choice["finish_reason"] == "stop"
    pattern = re.escape(expected) if expected in (WRITTEN, 'say "hi"') else expected
    assert re.fullmatch(pattern, choice["text"])


def test_any_object_has_vllms_name_too(served: Served) -> None:
    (choice,) = served.complete(max_tokens=3, structured_outputs={"json_object": True})["choices"]
    assert choice["text"].startswith("{")
    assert choice["finish_reason"] == "length"  # what is cut off says so


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"guided_regex": "a", "grammar": 'start: "a"'},
            "grammar",
            "guided_regex and grammar both ask for a form of the reply. Give one of them",
        ),
        (
            {"response_format": {"type": "json_object"}, "json_schema": SCHEMA},
            "json_schema",
            "response_format.type and json_schema both ask",
        ),
        ({"json_schema": "text"}, "json_schema", 'is "text", expected an object'),
        ({"guided_json": "{"}, "guided_json", "expected a JSON schema"),
        ({"guided_choice": []}, "guided_choice", "expected texts, none of them empty"),
        ({"guided_choice": [""]}, "guided_choice", "expected texts, none of them empty"),
        ({"guided_choice": [1]}, "guided_choice[0]", "is 1, expected text"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "There is no parameter"),
        (
            {"structured_outputs": {"whitespace_pattern": " *"}},
            "structured_outputs.whitespace_pattern",
            "white space and names are fixed",
        ),
        (
            {"response_format": {"type": "regex"}},
            "response_format.regex",
            "response_format.regex is missing",
        ),
        ({"grammar": "x" * 70000}, "grammar", "has 70000 characters, expected at most 65536"),
        ({"guided_regex": "[a"}, "guided_regex", "The regular expression cannot be kept to"),
        ({"grammar": "root ::= ("}, "grammar", "neither Lark nor GBNF"),
    ],
)
def test_a_form_that_cannot_be_is_refused(
    service: Service, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(complete, service, **fields)
    assert error.param == param
    assert re.search(re.escape(message), str(error))
