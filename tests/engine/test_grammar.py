"""Constraints by a schema, without a server: what they allow is what the schema accepts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm import RequestError, RuntimeUnavailableError
from edge_memllm.engine import grammar
from edge_memllm.engine.grammar import GrammarConstraint, Grammars
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.sampling import Constraint
from support.checkpoints import BOS, EOS, PAD, VOCABULARY
from support.small_model import IDENTITY, byte_tokenizer, model_spec

SPEC = dataclasses.replace(model_spec(IDENTITY, 0, 2, 64, VOCABULARY), eos_token_ids=(EOS,))
TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, SPEC)


def written(constraint: Constraint, choose: Any, most: int = 400) -> str | None:
    """Text by always choosing among what is allowed; None when it does not end."""
    tokens = []
    for _ in range(most):
        mask = constraint.allowed()
        assert mask is not None
        assert mask.shape == (VOCABULARY,)
        token = int(choose(np.flatnonzero(mask)))
        constraint.advance(token)
        if token == EOS:
            return TOKENIZER.decode(tokens)
        tokens.append(token)
    return None


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_whatever_is_chosen_fits_the_schema(random: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[a-c]{2,4}$"},
            "count": {"type": "integer", "minimum": 3, "maximum": 40},
            "kinds": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        },
        "required": ["code", "count"],
        "additionalProperties": False,
    }
    text = written(GRAMMARS.constraints(ResponseFormat.schema(schema))(), random.choice)
    assert text is not None
    found = json.loads(text)
    assert set("abc") >= set(found["code"])
    assert 2 <= len(found["code"]) <= 4
    assert 3 <= found["count"] <= 40
    assert set(found) <= {"code", "count", "kinds"}
    assert set(found.get("kinds", [])) <= {"x", "y"}


def test_any_object_begins_as_one_and_never_with_white_space() -> None:
    constraint = GRAMMARS.constraints(ResponseFormat("json_object"))()
    (only,) = np.flatnonzero(constraint.allowed())
    assert TOKENIZER.decode([int(only)]) == "{"


def test_special_tokens_and_those_without_a_spelling_are_never_allowed() -> None:
    constraint = GRAMMARS.constraints(ResponseFormat.schema({"type": "string"}))()
    constraint.advance(int(np.flatnonzero(constraint.allowed())[0]))
    mask = constraint.allowed()
    assert mask is not None
    assert not mask[[BOS, EOS, PAD]].any()
    assert not mask[PAD + 1 :].any()


def test_each_text_has_a_constraint_of_its_own() -> None:
    make = GRAMMARS.constraints(ResponseFormat.schema({"enum": ["ab", "cd"]}))
    first, second = make(), make()
    assert written(first, lambda ids: ids[0]) == '"ab"'
    assert written(second, lambda ids: ids[-1]) == '"cd"'


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99999989},
        {
            "allOf": [
                {"anyOf": [{"minimum": n, "type": "integer"}, {"pattern": f"a{{{n}}}"}]}
                for n in range(26)
            ]
        },
    ],
    ids=["a large multiple", "alternatives of alternatives"],
)
def test_a_schema_that_takes_too_long_is_given_up(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "TRIAL_SECONDS", 0.7)
    with pytest.raises(RequestError, match=r"cannot be kept to: .*(0\.7 seconds|memory|large)"):
        GRAMMARS.constraints(ResponseFormat.schema(schema))


@pytest.mark.skipif(os.name != "posix", reason="limits of processes are POSIX's")
def test_a_trial_that_nobody_waits_for_ends_by_itself() -> None:
    code = (
        "from edge_memllm.engine import grammar_trial as trial\n"
        "trial.MOST_SECONDS = 1\n"
        "trial.limit()\n"
        "while True: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode < 0


def test_a_schema_that_was_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(grammar, "_try_out", lambda text, noun: tried.append(text))
    grammars = Grammars(TOKENIZER, SPEC)
    for number in (*range(40), 39, 0):
        grammars.constraints(ResponseFormat.schema({"const": number}))
    assert len(tried) == 41  # the first was forgotten on the way


def test_a_frozen_program_does_without_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "nowhere")
    assert Grammars(TOKENIZER, SPEC).constraints(ResponseFormat.schema({"const": 1}))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a program that Python is embedded in would leave, were it started once more."""
    program, trace = tmp_path / "host", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return trace


@pytest.mark.parametrize("executable", ["", None, "no such file", "the host's"])
def test_an_embedded_python_is_found(
    executable: str | None, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executable != "the host's":
        monkeypatch.setattr(sys, "executable", executable)
    grammars = Grammars(TOKENIZER, SPEC)
    assert (
        written(grammars.constraints(ResponseFormat.schema({"const": 12}))(), lambda ids: ids[0])
        == "12"
    )
    with pytest.raises(RequestError, match="Unimplemented keys"):
        grammars.constraints(ResponseFormat.schema({"type": "object", "if": {}}))
    assert not host.exists()


@pytest.mark.parametrize("name", ["python3", "python3.11", "host"])
def test_without_a_python_it_is_said(
    name: str, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none, or something of its name that is not one: it does not take over the trial."""
    other = tmp_path / "bin" / name
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho something else\n")
    other.chmod(0o755)
    for prefix in ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, prefix, str(tmp_path))
    monkeypatch.setattr(sys, "_base_executable", None)
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: None)
    grammars = Grammars(TOKENIZER, SPEC)
    with pytest.raises(RuntimeUnavailableError, match=r"no Python was found for it .*/host'"):
        grammars.constraints(ResponseFormat.schema({"const": 1}))
    assert grammars.constraints(
        ResponseFormat("json_object")
    )()  # a schema of our own needs no trial
    assert not host.exists()


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="it is nested too deeply"):
        GRAMMARS.constraints(ResponseFormat.schema(schema))


def test_words_of_a_schema_cannot_be_overlooked() -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "object", "if": {}}
    with pytest.raises(RequestError, match="Unimplemented keys"):
        GRAMMARS.constraints(ResponseFormat.schema(schema))


def test_a_schema_that_nothing_fits_is_refused_at_once() -> None:
    schema = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    with pytest.raises(RequestError, match="cannot be kept to"):
        GRAMMARS.constraints(ResponseFormat.schema(schema))


def test_a_model_that_cannot_end_a_text_is_refused() -> None:
    spec = dataclasses.replace(SPEC, eos_token_ids=())
    with pytest.raises(RequestError, match="no token that ends a text"):
        Grammars(TOKENIZER, spec).constraints(ResponseFormat("json_object"))


def test_a_tokenizer_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "definition", "{}")
    with pytest.raises(RequestError, match="llguidance cannot use the model's tokenizer: "):
        Grammars(TOKENIZER, SPEC).constraints(ResponseFormat("json_object"))


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install '\.\[serve\]'"):
        Grammars(TOKENIZER, SPEC).constraints(ResponseFormat("json_object"))


class Broken:
    """A matcher that has met a limit."""

    def compute_logit_bias(self) -> bytes:
        return bytes(VOCABULARY)

    def consume_token(self, token: int) -> bool:
        return False

    def is_error(self) -> bool:
        return True

    def get_error(self) -> str:
        return "too\n complex."


def test_a_grammar_that_gives_up_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"the schema gave up: too complex\. Simplify it\."):
        GrammarConstraint(Broken(), "schema").allowed()  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="gave up"):
        GrammarConstraint(Broken(), "schema").advance(1)  # type: ignore[arg-type]
