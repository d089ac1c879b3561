r"""Arguments as Qwen3-Coder writes them, a tag for each parameter: read as JSON, and as a grammar.

`<parameter=city>\nParis\n</parameter>`: texts stand as they are, all other values as JSON. Which
of the two a value is, its schema says. What is a JSON object already is read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from edge_memllm.text.tools.gemma_grammar import UnwrittenError

Schema: TypeAlias = Mapping[str, Any]

_OPEN, _CLOSE = "<parameter={name}>\n", "\n</parameter>\n"
_PARAMETER = re.compile(r"\s*<parameter=([^\s<>=]{1,256})>\n?(.*?)\n?</parameter>", re.DOTALL)
_PYTHON = {"True": True, "False": False, "None": None}  # as templates write them in a history
# Of a text, what a grammar of any text does not keep to.
_BOUNDS = ("pattern", "format", "minLength", "maxLength", "const", "allOf", "not")


def read_parameters(text: str, schema: Schema) -> str | None:
    """Return the JSON of what stands between the tags of a function; None for what is none."""
    if text.lstrip().startswith("{"):
        return text.strip()
    properties = schema.get("properties")
    found: dict[str, Any] = {}
    at = 0
    while match := _PARAMETER.match(text, at):
        name, value = match.groups()
        described = properties.get(name) if isinstance(properties, Mapping) else None
        found[name] = _value(value, described if isinstance(described, Mapping) else {})
        at = match.end()
    return None if text[at:].strip() else json.dumps(found, ensure_ascii=False)


def _value(text: str, schema: Schema) -> Any:
    """Return the value of a parameter: a text where its schema has no other kind."""
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    try:
        value = _PYTHON[text] if text in _PYTHON else json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) and "string" in kinds else value


def _kinds(schema: Schema) -> set[str]:
    """Return the types that a schema allows; without a word of it, a text."""
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list):
            return set().union(*(_kinds(each) for each in parts if isinstance(each, Mapping)))
    if isinstance(values := schema.get("enum"), list):
        return {"string" if isinstance(each, str) else "other" for each in values}
    kinds = schema.get("type", "other" if "$ref" in schema or "const" in schema else "string")
    return set(kinds) if isinstance(kinds, list) else {str(kinds)}


def parameter_rules(name: str, schema: Schema, json_rule: Callable[[Schema], str]) -> list[str]:
    """Return rules of which the first, `name`, is of all parameters in their order.

    `json_rule` returns what stands in a rule for JSON by a schema. Raises `UnwrittenError` for what
    these rules do not have.
    """
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or schema.get("additionalProperties"):
        raise UnwrittenError("parameters of any names")
    required = set(schema.get("required", ()))
    if not required <= set(properties):
        raise UnwrittenError("a parameter that is not described")
    written, parts = [""], []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for number, (key, described) in enumerate(properties.items()):
        if not isinstance(described, Mapping):
            raise UnwrittenError("a parameter without a schema")
        rule = f"{name}_{number}"
        head = json.dumps(_OPEN.replace("{name}", key))
        parts.append(rule if key in required else f"({rule})?")
        written += _parameter(rule, head, {**shared, **described}, json_rule)
    written[0] = f"{name}: {' '.join(parts)}" if parts else f'{name}: ""'
    return written


def _parameter(
    rule: str, head: str, schema: Schema, json_rule: Callable[[Schema], str]
) -> list[str]:
    kinds, close = _kinds(schema), json.dumps(_CLOSE)
    if "string" not in kinds:
        return [f"{rule}: {head} {rule}_value {close}", f"{rule}_value: {json_rule(schema)}"]
    if kinds != {"string"} or any(key in schema for key in _BOUNDS):
        raise UnwrittenError("a value that is a text or something else, or a text with bounds")
    if "enum" in schema:
        values = " | ".join(map(json.dumps, schema["enum"]))
        return [f"{rule}: {head} ({values}) {close}"]
    return [f"{rule}: {head} {rule}_text", f"{rule}_text[suffix={close}]: /(?s:.*)/"]
