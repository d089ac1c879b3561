"""The form of a reply that a client asks for, under the names of OpenAI, vLLM and llama.cpp.

One form at most. Compiling it may take a while, and it may turn out not to do: that is the
service's affair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from edge_memllm.engine.response_format import ResponseFormat, choice
from edge_memllm.server.fields import BodyFields, checked_text, refused, shown
from edge_memllm.server.parameters import nothing_of

KINDS = ("text", "json_object", "json_schema", "regex", "grammar")
MOST_CHOICES = 1024
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST_DESCRIPTION = 4096
_STRUCTURED_UNSUPPORTED = nothing_of(
    "white space and names are fixed",
    disable_fallback=(False, True),
    disable_any_whitespace=(False, True),
    disable_additional_properties=(False,),
    whitespace_pattern=(),
    structural_tag=(),
)


class WantedForm(NamedTuple):
    """A form, and the field that asks for it."""

    form: ResponseFormat
    where: str


_Take: TypeAlias = Callable[[BodyFields, str, int], ResponseFormat | None]


def take_form(fields: BodyFields, most_bytes: int) -> WantedForm | None:
    """Take every field that asks for a form; None when the text is free. Raises `ApiError`."""
    wanted = [*_wanted(fields, most_bytes)]
    if len(wanted) > 1:
        first, second = wanted[0].where, wanted[1].where
        message = f"{first} and {second} both ask for a form of the reply. Give one of them."
        raise refused(second, message)
    return wanted[0] if wanted else None


def _wanted(fields: BodyFields, most: int) -> Iterator[WantedForm]:
    wanted = fields.group("response_format")
    if wanted is not None and (found := _openai(wanted, most)) is not None:
        yield found
    structured = fields.group("structured_outputs")
    if structured is not None:
        yield from _named(structured, _STRUCTURED, most)
        structured.finish(_STRUCTURED_UNSUPPORTED)
    yield from _named(fields, _FIELDS, most)


def _named(fields: BodyFields, names: Mapping[str, _Take], most: int) -> Iterator[WantedForm]:
    for name, take in names.items():
        found = take(fields, name, most)
        if found is not None:
            yield WantedForm(found, fields.param(name))


def _openai(wanted: BodyFields, most: int) -> WantedForm | None:
    """Take `response_format`. A schema is always kept to, strict or not."""
    kind, where = wanted.required("type"), wanted.param("type")
    if kind not in KINDS:
        expected = " or ".join(f"'{each}'" for each in KINDS)
        raise refused(where, f"{where} is {shown(kind)}, expected {expected}.")
    form: ResponseFormat | None = None
    if kind == "json_schema":
        schema = wanted.required_group(kind)
        wanted.finish()
        return take_json_schema(schema, most)
    if kind == "json_object":  # llama.cpp takes a schema with it
        form = _schema(wanted, "schema", most) or ResponseFormat("json_object")
    elif kind != "text":
        name = str(kind)
        form, where = _TEXTS[name](wanted, name, most), wanted.param(name)
        if form is None:
            raise refused(where, f"{where} is missing.", "missing_required_parameter")
    wanted.finish()
    return None if form is None else WantedForm(form, where)


def take_json_schema(fields: BodyFields, most: int) -> WantedForm:
    """Take a schema with its name, and whether it is strict."""
    name = fields.value("name")  # which OpenAI asks for, llama.cpp does not, and nothing needs
    if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
        where = fields.param("name")
        expected = "1 to 64 letters, digits, underscores and dashes"
        raise refused(where, f"{where} is {shown(name)}, expected {expected}.")
    fields.bounded_text("description", _MOST_DESCRIPTION)  # for a reader; no grammar can keep to it
    strict = fields.flag("strict")
    form = _schema(fields, "schema", most, strict=strict) or ResponseFormat.schema(
        {}, strict=strict
    )
    fields.finish()
    return WantedForm(form, fields.param("schema"))


def _schema(
    fields: BodyFields, name: str, most: int, *, strict: bool = False
) -> ResponseFormat | None:
    """Take a schema, or its text, which vLLM takes as well."""
    value, where = fields.value(name), fields.param(name)
    if isinstance(value, str) and name in _SCHEMA_TEXTS:
        try:
            value = json.loads(checked_text(value, where, most))
        except (ValueError, RecursionError):
            raise refused(where, f"{where} is {shown(value)}, expected a JSON schema.") from None
    if value is None:
        return None
    if not isinstance(value, dict):
        raise refused(where, f"{where} is {shown(value)}, expected an object.")
    size = len(json.dumps(value))
    if size > most:
        raise refused(where, f"{where} has {size} bytes, expected at most {most}.")
    return ResponseFormat.schema(value, strict=strict)


def _regex(fields: BodyFields, name: str, most: int) -> ResponseFormat | None:
    text = fields.bounded_text(name, most)
    return ResponseFormat("regex", text) if text else None


def _grammar(fields: BodyFields, name: str, most: int) -> ResponseFormat | None:
    text = fields.bounded_text(name, most)
    return ResponseFormat("grammar", text) if text else None


def _choice(fields: BodyFields, name: str, most: int) -> ResponseFormat | None:
    items, where = fields.optional_items(name, MOST_CHOICES), fields.param(name)
    if items is None:
        return None
    texts = [checked_text(each, f"{where}[{number}]", most) for number, each in enumerate(items)]
    if not texts or "" in texts:
        raise refused(where, f"{where} is {shown(items)}, expected texts, none of them empty.")
    return choice(texts)


def _any_object(fields: BodyFields, name: str, most: int) -> ResponseFormat | None:
    return ResponseFormat("json_object") if fields.flag(name) else None


_SCHEMA_TEXTS = ("json", "guided_json")
_TEXTS: Mapping[str, _Take] = {"regex": _regex, "grammar": _grammar}
_STRUCTURED: Mapping[str, _Take] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}
_FIELDS: Mapping[str, _Take] = {
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "json_schema": _schema,
    "grammar": _grammar,
}
