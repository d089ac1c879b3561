"""Arguments as Gemma writes them, as rules of a grammar in Lark, by their JSON schema.

`gemma_values` reads what they allow. Numbers, true, false and null are written as in JSON, and so
JSON's own rules hold for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any]

_MOST_ITEMS = 16  # where a schema sets no limit
# Without the beginning of a quote; where the quote is no token, a text cannot tell when it begins.
_TEXT, _TEXT_OF_LETTERS = r"/([^<]|<[^|e])*/", "/[^<]*/"
# What says nothing of how a value is written, or is said by the rules here.
_KNOWN = frozenset(
    (
        *("$defs", "$ref", "$schema", "definitions", "title", "description", "default", "examples"),
        *("deprecated", "type", "enum", "const", "anyOf", "oneOf", "nullable"),
        *("properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
_PLAIN = ("integer", "number", "boolean", "null")


class UnwrittenError(ValueError):
    """A schema that asks for what these rules do not have."""


def argument_rules(
    name: str, schema: Schema, quote: str, json_rule: Callable[[Schema], str]
) -> list[str]:
    """Return rules of which the first, `name`, is of the whole object.

    `quote` is what stands around texts, as the grammar writes it; `json_rule` what stands in a rule
    for JSON by a schema. Raises `UnwrittenError`.
    """
    rules = _Rules(name, schema, quote, json_rule)
    rules.add(name, schema)
    return rules.written


class _Rules:
    def __init__(
        self, name: str, root: Schema, quote: str, json_rule: Callable[[Schema], str]
    ) -> None:
        self.written: list[str] = []
        self._name = name
        self._root = root
        self._quote = quote
        self._json_rule = json_rule
        self._named: dict[str, str] = {}  # rules by what refers to them

    def add(self, name: str, schema: Any) -> None:
        """Add the rule of a value."""
        place = len(self.written)
        self.written.append("")  # before those that it needs
        self.written[place] = f"{name}: {self._value(schema)}"

    def _rule(self, schema: Any) -> str:
        """Return the name of a new rule."""
        name = f"{self._name}_{len(self.written)}"
        self.add(name, schema)
        return name

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping) or not set(schema) <= _KNOWN:
            raise UnwrittenError("a word that is not known here")
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return " | ".join(self._rule(each) for each in schema[key])
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            return " | ".join(map(self._constant, values))
        kinds = schema.get("type")
        if isinstance(kinds, list):
            return " | ".join(self._rule({**schema, "type": kind}) for kind in kinds)
        return self._of_kind(kinds, schema)

    def _of_kind(self, kind: object, schema: Schema) -> str:
        if kind in _PLAIN:
            return self._json_rule({k: v for k, v in schema.items() if k != "nullable"})
        if kind == "string":
            text = _TEXT if self._quote.startswith("<") else _TEXT_OF_LETTERS
            return f"{self._quote} {text} {self._quote}"
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        raise UnwrittenError("a value of any type")

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return " ".join(
                each for each in (self._quote, value and json.dumps(value), self._quote) if each
            )
        if isinstance(value, list | dict):
            raise UnwrittenError("a constant that has parts")
        return json.dumps(json.dumps(value))

    def _array(self, schema: Schema) -> str:
        item = self._rule(schema.get("items", {"type": "string"}))
        least, most = schema.get("minItems", 0), schema.get("maxItems", _MOST_ITEMS)
        if most < 1:
            return '"[]"'
        items = f'{item} ("," {item}){{{max(least - 1, 0)},{max(most, least) - 1}}}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _object(self, schema: Schema) -> str:
        """Members in the order of their names, as templates write them."""
        if "properties" not in schema:
            raise UnwrittenError("an object of any members")
        members = sorted(schema["properties"].items())
        required = set(schema.get("required", ()))
        if not required <= {name for name, _ in members}:
            raise UnwrittenError("a member that is not described")
        pairs = [
            (f"{json.dumps(f'{name}:')} {self._rule(each)}", name in required)
            for name, each in members
        ]
        return f'"{{" {_listed(pairs)} "}}"'

    def _referred(self, reference: object) -> str:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise UnwrittenError("a reference to elsewhere")
        if reference not in self._named:
            found: Any = self._root
            for key in reference[2:].split("/"):
                found = found.get(key) if isinstance(found, Mapping) else None
            self._named[reference] = f"{self._name}_ref_{len(self._named)}"
            self.add(self._named[reference], found)
        return self._named[reference]


def _listed(pairs: Sequence[tuple[str, bool]]) -> str:
    """Return members with commas between those there are; a pair says if one has to be."""
    if not pairs:
        return ""
    behind = "".join(f' "," {text}' if needed else f' ("," {text})?' for text, needed in pairs[1:])
    first, needed = pairs[0]
    if needed:
        return first + behind
    return f"({first}{behind} | {_listed(pairs[1:])})" if len(pairs) > 1 else f"({first})?"
