"""Python functions as tools: signature and docstring become what a model is told of them.

The form is that of `get_json_schema` of transformers, so that a chat template sees the same: type
hints say which values, a docstring in Google's style what each is for.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from edge_memllm.errors import RequestError
from edge_memllm.text.tools.formats import Tool

_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_PLAIN = {**_NAMES, list: "array", tuple: "array", dict: "object"}
_SECTION = re.compile(r"[ \t]*(Args|Returns|Raises):[ \t]*")
_ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:[ \t]*(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_HINTS = (
    "int, float, str, bool, None, Literal, Enum, and list, tuple, dict and | of those; or give the "
    "tool as an object with its JSON schema"
)

Schema = dict[str, Any]


class Docstring(NamedTuple):
    """A docstring in Google's style, each part on one line but for the summary."""

    summary: str
    arguments: Mapping[str, str]
    returns: str | None


def function_tool(function: Callable[..., Any]) -> Tool:
    """Return the tool that a function is; the model's calls name it by its `__name__`.

    Every argument needs a type hint and a line under `Args:` of the docstring. A line that ends in
    `(choices: ["a", "b"])` allows those alone. Raises `RequestError` for what is missing, and for
    hints that no JSON can be made of.
    """
    name = getattr(function, "__name__", type(function).__name__)
    text = inspect.getdoc(function)
    if not text:
        raise RequestError(
            f"the tool {name} has no docstring, so a model cannot know what it is for. Write one, "
            "with a line for each argument under Args:."
        )
    told = read_docstring(text)
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise RequestError(
            f"the tool {name}: a type hint is not there ({error}). Import what it names."
        ) from error
    properties, required = {}, []
    for argument in _arguments(function):
        properties[argument.name] = _described(name, argument, hints, told)
        if argument.default is inspect.Parameter.empty:
            required.append(argument.name)
    parameters: Schema = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    given: Schema = {"name": name, "description": told.summary, "parameters": parameters}
    if (returns := _returned(hints, told)) is not None:
        given["return"] = returns
    return Tool(
        name,
        told.summary,
        _in_json_schema(parameters),
        given={"type": "function", "function": given},
    )


def read_docstring(text: str) -> Docstring:
    """Return summary, arguments and what is returned of a docstring without its indentation."""
    sections: dict[str, list[str]] = {"": []}
    current = sections[""]
    for line in text.strip().split("\n"):
        if found := _SECTION.fullmatch(line):
            current = sections.setdefault(found[1], [])
        else:
            current.append(line)
    returns = "\n".join(sections.get("Returns", ())).strip()
    return Docstring(
        "\n".join(sections[""]).strip(),
        _argument_lines([line for line in sections.get("Args", ()) if line.strip()]),
        returns or None,
    )


def _argument_lines(lines: Sequence[str]) -> dict[str, str]:
    """Return the description of each argument; lines that are indented deeper go on with it."""
    found: dict[str, list[str]] = {}
    indent, current = "", None
    for line in lines:
        begun = _ARGUMENT.fullmatch(line)
        deeper = current is not None and re.match(rf"{indent}[ \t]", line)
        if begun is not None and not deeper:
            indent = begun[1]
            current = found[begun[2]] = [begun[3]]
        elif current is not None:
            current.append(line)
    return {name: " ".join(filter(None, map(str.strip, each))) for name, each in found.items()}


def _arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = list(inspect.signature(function).parameters.values())
    empty = inspect.Parameter.empty
    if found and found[0].name in ("self", "cls") and found[0].annotation is empty:
        return found[1:]
    return found


def _described(
    name: str, argument: inspect.Parameter, hints: Mapping[str, Any], told: Docstring
) -> Schema:
    where = f"the tool {name}: the argument {argument.name}"
    if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
        raise RequestError(f"{where} stands for any number of them. Name each.")
    if argument.name not in hints:
        raise RequestError(f"{where} has no type hint. Give it one of {_HINTS}.")
    if argument.name not in told.arguments:
        raise RequestError(f"{where} is not in the docstring. Write a line for it under Args:.")
    schema, text = _schema(hints[argument.name], where), told.arguments[argument.name]
    if choices := _CHOICES.search(text):
        schema["enum"] = _choices(choices[1], where)
        text = text[: choices.start()].strip()
    return {**schema, "description": text}


def _choices(text: str, where: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise RequestError(f'{where}: (choices: {text}) is no list such as ["a", "b"] in JSON.')
    return [each.strip() if isinstance(each, str) else each for each in found]


def _returned(hints: Mapping[str, Any], told: Docstring) -> Schema | None:
    """Return the schema of what is returned. The model makes none, so what has none is left out."""
    if "return" not in hints:
        return None
    try:
        schema = _schema(hints["return"], "")
    except RequestError:
        return None
    return schema if told.returns is None else {**schema, "description": told.returns}


def _schema(hint: Any, where: str) -> Schema:
    """Return the schema of the values of a type hint."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and origin is None and issubclass(hint, Enum):
        return _one_of([member.value for member in hint], where)
    if origin is None and hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is Literal:
        return _one_of(list(parts), where)
    if origin in (Union, UnionType):
        return _union(parts, where)
    if origin is list:
        return {"type": "array", "items": _schema(parts[0], where)}
    if origin is tuple and len(parts) > 1 and ... not in parts:
        return {"type": "array", "prefixItems": [_schema(each, where) for each in parts]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(parts[1], where)}
    shown = getattr(hint, "__name__", hint) if origin is None else hint
    raise RequestError(f"{where} is of type {shown!s:.60}, expected {_HINTS}.")


def _one_of(values: list[Any], where: str) -> Schema:
    if not values or any(type(each) not in _NAMES for each in values):
        raise RequestError(
            f"{where} is one of {values!r:.60}, expected texts, numbers, truth values or None."
        )
    kinds = list(dict.fromkeys(_NAMES[type(each)] for each in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(parts: Sequence[Any], where: str) -> Schema:
    schemas = [_schema(each, where) for each in parts if each is not type(None)]
    found: Schema
    if len(schemas) == 1:
        found = schemas[0]
    elif all(each.keys() == {"type"} and isinstance(each["type"], str) for each in schemas):
        kinds = sorted({each["type"] for each in schemas})
        found = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        found = {"anyOf": schemas}
    return {**found, "nullable": True} if type(None) in parts else found


def _in_json_schema(schema: Any) -> Any:
    """Return a schema without `nullable`, a word of templates, in the words of JSON Schema."""
    if isinstance(schema, list):
        return [_in_json_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _in_json_schema(value) for key, value in schema.items() if key != "nullable"}
    if schema.get("nullable") is not True:
        return found
    said = {"description": found.pop("description")} if "description" in found else {}
    return {"anyOf": [found, {"type": "null"}], **said}
