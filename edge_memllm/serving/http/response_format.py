"""The field `response_format`: free text, any JSON object, or JSON that fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from edge_memllm.serving.http.api_error import refused
from edge_memllm.serving.http.fields import BodyFields, shown

KINDS = ("text", "json_object", "json_schema")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST_DESCRIPTION = 4096


class WantedSchema(NamedTuple):
    """JSON of a form; compiling the schema may take a while, and it may turn out not to do."""

    schema: Mapping[str, object] | None  # None for any one object
    where: str  # the field that asks for it


def take_schema(fields: BodyFields, most_bytes: int) -> WantedSchema | None:
    """Take the field; None when the text is free. A schema is always kept to, strict or not."""
    wanted = fields.group("response_format")
    if wanted is None:
        return None
    kind, where = wanted.required("type"), wanted.param("type")
    if kind not in KINDS:
        expected = " or ".join(f"'{each}'" for each in KINDS)
        raise refused(where, f"{where} is {shown(kind)}, expected {expected}.")
    schema = wanted.group("json_schema") if kind == "json_schema" else None
    if kind == "json_schema" and schema is None:
        wanted.required("json_schema")
    wanted.finish()
    if schema is not None:
        return _taken(schema, most_bytes)
    if kind == "text":
        return None
    return WantedSchema(None, where)


def _taken(fields: BodyFields, most_bytes: int) -> WantedSchema:
    name = fields.required("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        where = fields.param("name")
        expected = "1 to 64 letters, digits, underscores and dashes"
        raise refused(where, f"{where} is {shown(name)}, expected {expected}.")
    fields.bounded_text("description", _MOST_DESCRIPTION)  # for a reader; no grammar can keep to it
    fields.flag("strict")
    schema, where = fields.value("schema"), fields.param("schema")
    fields.finish()
    if schema is None:
        schema = {}
    if not isinstance(schema, dict):
        raise refused(where, f"{where} is {shown(schema)}, expected an object.")
    size = len(json.dumps(schema))
    if size > most_bytes:
        raise refused(where, f"{where} has {size} bytes, expected at most {most_bytes}.")
    return WantedSchema(schema, where)
