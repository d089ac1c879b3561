"""The form a reply is held to: JSON, a JSON schema, a regular expression, a grammar.

Knows what programs write for each, OpenAI's `response_format` first of all. What makes a
constraint of it is `grammar`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from edge_memllm.checked_values import wrong_value
from edge_memllm.errors import RequestError

Kind: TypeAlias = Literal["json_object", "json_schema", "regex", "grammar", "calls"]
KINDS: tuple[Kind, ...] = ("json_object", "json_schema", "regex", "grammar")  # for requests

_EXPECTED = (
    "a JSON schema, a class of pydantic's, or an object such as {'type': 'json_object'}, "
    "{'type': 'json_schema', 'json_schema': {'schema': ...}}, {'type': 'regex', 'regex': ...} or "
    "{'type': 'grammar', 'grammar': ...}"
)


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What a reply is to look like: `text` is a schema as JSON, an expression, or a grammar.

    That of "calls" is a grammar of calls of tools, whose arguments are JSON.
    """

    kind: Kind
    text: str = ""
    strict: bool = False  # of a schema: objects with properties have no others, whatever it says

    @classmethod
    def of(cls, value: object) -> ResponseFormat | None:
        """Return the form that a value asks for, None where the text is free.

        Takes OpenAI's objects, a JSON schema, a class with `model_json_schema` (pydantic's), and
        what it returns. Raises `RequestError` for anything else.
        """
        if value is None or isinstance(value, cls):
            return value
        schema = getattr(value, "model_json_schema", None)
        if callable(schema):
            return cls.schema(schema())
        if not isinstance(value, Mapping):
            raise wrong_value("response_format", value, _EXPECTED)
        kind = value.get("type")
        if kind in ("text", *KINDS):
            return cls._of_openai(kind, value)
        return cls.schema(value)

    @classmethod
    def schema(cls, schema: Mapping[str, Any], *, strict: bool = False) -> ResponseFormat:
        """Return the form of JSON that a schema accepts. Raises `RequestError`."""
        try:
            return cls("json_schema", json.dumps(schema), strict)
        except RecursionError:
            raise RequestError(
                "the schema cannot be kept to: it is nested too deeply. Simplify it."
            ) from None
        except (TypeError, ValueError) as error:
            raise RequestError(f"the schema is no JSON: {error}.") from None

    @classmethod
    def _of_openai(cls, kind: str, value: Mapping[str, Any]) -> ResponseFormat | None:
        if kind == "text":
            return None
        if kind == "json_object":
            return cls("json_object")
        given = value.get(kind)
        if kind != "json_schema":
            if not isinstance(given, str) or not given:
                raise wrong_value(f"response_format.{kind}", given, "text")
            return cls("regex" if kind == "regex" else "grammar", given)
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if not isinstance(given, Mapping) or not isinstance(schema, Mapping):
            expected = "an object with the schema under 'schema'"
            raise wrong_value("response_format.json_schema", given, expected)
        return cls.schema(schema, strict=given.get("strict") is True)

    @property
    def schema_text(self) -> str:
        """The schema of JSON, as text: where it is any object, that of one."""
        return self.text or '{"type": "object"}'

    @property
    def is_json(self) -> bool:
        """Whether a whole reply is one JSON value."""
        return self.kind.startswith("json")

    @property
    def has_json(self) -> bool:
        """Whether it is JSON that the text has to come to an end of."""
        return self.is_json or self.kind == "calls"

    @property
    def noun(self) -> str:
        """What it is called in a sentence."""
        names: dict[Kind, str] = {
            "grammar": "grammar",
            "regex": "regular expression",
            "calls": "schema of a tool",
        }
        return names.get(self.kind, "schema")


def choice(texts: Iterable[str]) -> ResponseFormat:
    """Return the form of a reply that is one of some texts."""
    return ResponseFormat("grammar", "start: " + " | ".join(json.dumps(each) for each in texts))
