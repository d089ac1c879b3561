"""The grammar of calls, in Lark as llguidance reads it: for calls that must come, or have begun."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from edge_memllm.text.tools.formats import Tool, ToolFormat
from edge_memllm.text.tools.gemma_grammar import UnwrittenError, argument_rules
from edge_memllm.text.tools.parameters import parameter_rules

JsonRule: TypeAlias = Callable[[Mapping[str, Any], bool], str]

# A small model that may write one call more always does.
MOST_CALLS = 8


def call_grammar(
    format: ToolFormat,
    tools: Sequence[Tool],
    token: Callable[[str], int | None],
    json_rule: JsonRule,
    *,
    parallel: bool = True,
    answer: str | None = None,
) -> str:
    """Return a grammar of one call of these tools, or of several where they may be `parallel`.

    `token` gives the id of an entry of the vocabulary, which a grammar has to name by its id;
    `json_rule` what stands in a rule for JSON by a schema, strict or not; `answer` is the rule of
    what may come in place of calls.
    """
    spelling = format.spelling
    literal = _Literals(format.tokens, token)
    most = min(format.most or MOST_CALLS, MOST_CALLS if parallel else 1)
    more = f" ({literal(spelling.between)} call){{0,{most - 1}}}" if most > 1 else ""
    rules = [
        "start: calls" if answer is None else "start: calls | answer",
        f"calls: {literal(spelling.begin)} call{more} {literal(spelling.end)}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        head, closed = literal(spelling.head(tool.name)), literal(spelling.closed)
        rules.append(f"call_{number}: {head} arguments_{number} {closed}")
        rules += _arguments(f"arguments_{number}", format, tool, literal, json_rule)
    if answer is not None:
        rules.append(f"answer: {answer}")
    return "\n".join(rules)


def _arguments(
    name: str, format: ToolFormat, tool: Tool, literal: _Literals, json_rule: JsonRule
) -> list[str]:
    """Return the rules of a tool's arguments: JSON, but for a format that has a form of its own.

    JSON is read there too, so it stands in for what that form has no rules for.
    """
    json = f"{name}: {json_rule(tool.schema, tool.strict)}"
    if format.values == "json":
        return [json]
    plain = partial(_plain, json_rule)
    try:
        if format.values == "tags":
            return parameter_rules(name, tool.schema, plain)
        return argument_rules(name, tool.schema, literal(format.quote), plain)
    except UnwrittenError:
        return [json]


def _plain(json_rule: JsonRule, schema: Mapping[str, Any]) -> str:
    return json_rule(schema, False)


class _Literals:
    """Writes texts for a grammar, with the entries of the vocabulary in them by their ids."""

    def __init__(self, entries: Sequence[str], token: Callable[[str], int | None]) -> None:
        self._ids = {each: found for each in entries if (found := token(each)) is not None}
        self._split = re.compile("|".join(map(re.escape, self._ids)) or "(?!)")

    def __call__(self, text: str) -> str:
        return " ".join(self._parts(text)) or '""'

    def _parts(self, text: str) -> Iterator[str]:
        at = 0
        for match in self._split.finditer(text):
            if match.start() > at:
                yield json.dumps(text[at : match.start()])
            yield f"<[{self._ids[match[0]]}]>"
            at = match.end()
        if at < len(text):
            yield json.dumps(text[at:])
