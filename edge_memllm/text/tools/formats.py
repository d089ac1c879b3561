"""The spellings of tool calls, and which one a chat template implies.

A format is data: what may stand before the arguments of a call, what may stand behind them, and
how a call is written where it must come. `parsing` and `spelling` do the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

# Names that OpenAI takes as well.
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask its caller to run.

    `parameters` is the JSON schema of its arguments, an object; None takes none. `given` is the
    tool as it was given, which chat templates get to see.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    given: Mapping[str, Any] | None = None

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments."""
        return self.parameters or {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }

    def as_given(self) -> Mapping[str, Any]:
        """Return the tool in OpenAI's form, as templates want it."""
        if self.given is not None:
            return self.given
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": dict(self.schema)}}


class Gap(Enum):
    """What a pattern leaves open."""

    SPACE = "white space, or none"
    NAME = "the name of a tool"
    WORD = "letters and digits"
    TEXT = "a JSON text without escapes"


# What is spelt out, and what is left open, one behind the other.
Pattern: TypeAlias = tuple[str | Gap, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How calls are written: `begin`, calls with `between`, `end`; `{name}` stands in a call."""

    call: str  # up to the arguments
    closed: str  # behind them
    begin: str = ""
    between: str = ""
    end: str = ""

    def head(self, name: str) -> str:
        """Return what stands before the arguments of a call."""
        return self.call.replace("{name}", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way of writing tool calls.

    Attributes:
        name: For people.
        heads: What begins a call wherever it stands, up to the brace of its arguments.
        first: What begins one only where a reply begins.
        more: What begins one right behind another.
        tails: What ends one; the longest that fits is taken.
        spelling: How one is written where it must come.
        values: How arguments are written: as JSON, as Gemma does, or a tag for each.
        end: What ends them, where they are not JSON.
        quote: What stands around their texts there.
        tokens: Entries of the vocabulary that belong to it: they are read though they are special.
        ends: Tokens that end a reply with calls, where the vocabulary has them.
        most: How many calls a reply may have, as far as the format says.
        short_ids: Whether the template takes ids of calls of nine letters and digits only.
        describes: Whether the template tells of tools; else `prompt` does.
        in_system: Whether it tells of those that a system's message holds, as JSON text.
    """

    name: str
    heads: tuple[Pattern, ...] = ()
    first: tuple[Pattern, ...] = ()
    more: tuple[Pattern, ...] = ()
    tails: tuple[Pattern, ...] = ()
    spelling: Spelling
    values: Literal["json", "gemma", "tags"] = "json"
    end: str = ""
    quote: str = ""
    tokens: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    most: int | None = None
    short_ids: bool = False
    describes: bool = True
    in_system: bool = False


def _objects(*before: str | Gap) -> tuple[Pattern, ...]:
    """Return what begins a call that is a JSON object, in the ways models write it."""
    s = Gap.SPACE

    def member(key: str, *value: str | Gap) -> Pattern:
        return (f'"{key}"', s, ":", s, *value, s)

    names = (member("name", '"', Gap.NAME, '"'), member("function", '"', Gap.NAME, '"'))
    told = ((), *((*member(key, '"', Gap.TEXT, '"'), ",", s) for key in ("type", "id")))
    return tuple(
        (*before, "{", s, *said, *name, ",", s, f'"{key}"', s, ":", s, "{")
        for said in told
        for name in names
        for key in ("arguments", "parameters")
    )


_S = Gap.SPACE
# Tools that a template takes from a message, where they are JSON text.
_IN_SYSTEM = re.compile(r"message(\.tools\b|\[['\"]tools['\"]\])")
_ENDINGS: tuple[Pattern, ...] = ((_S, "}"), (_S, "}", _S, "```"), (_S, "}", _S, "]"))
_BARE = (
    *_objects(),
    *_objects("[", _S),
    *_objects("```json", _S),
    *_objects("```", _S),
    *_objects("```json", _S, "[", _S),
)
_MORE = (*_objects(_S), *_objects(_S, ",", _S), *_objects(_S, ";", _S))
_BARE_TAILS = (*_ENDINGS, (_S, "}", _S, "]", _S, "```"))

HERMES = ToolFormat(
    name="hermes",
    heads=(*_objects("<tool_call>", _S), *_objects("<tool_call>", _S, "[", _S)),
    more=(*_objects(_S, ",", _S), *_objects(_S, "<tool_call>", _S)),
    tails=(
        (_S, "}"),
        (_S, "}", _S, "</tool_call>"),
        (_S, "}", _S, "]", _S, "</tool_call>"),
        (_S, "</tool_call>"),
    ),
    spelling=Spelling(
        call='<tool_call>\n{"name": "{name}", "arguments": ',
        closed="}\n</tool_call>",
        between="\n",
    ),
    tokens=("<tool_call>", "</tool_call>"),
)

QWEN_CODER = ToolFormat(
    name="qwen-coder",
    heads=(
        ("<tool_call>", _S, "<function=", Gap.NAME, ">"),
        ("<function=", Gap.NAME, ">"),  # the first tag may be left out
    ),
    more=(
        (_S, "<tool_call>", _S, "<function=", Gap.NAME, ">"),
        (_S, "<function=", Gap.NAME, ">"),
    ),
    tails=((_S, "</tool_call>"),),
    spelling=Spelling(
        call="<tool_call>\n<function={name}>\n",
        closed="</function>\n</tool_call>",
        between="\n",
    ),
    values="tags",
    end="</function>",
    tokens=("<tool_call>", "</tool_call>"),
)

_CALLS, _CALLED = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001 - as it is spelt
_CALL, _NEXT = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"  # noqa: RUF001
_DONE = "<｜tool▁call▁end｜>"  # noqa: RUF001
_DEEPSEEK_TOKENS = (_CALLS, _CALLED, _CALL, _NEXT, _DONE)


def _deepseek(source: str) -> ToolFormat:
    """DeepSeek's two forms: V3's and R1's, in a block of code, and V3.1's."""
    fenced = "```json" in source
    begin, closed = (f"{_CALL}function{_NEXT}", f"\n```{_DONE}") if fenced else (_CALL, _DONE)
    behind = "\n```json\n" if fenced else _NEXT
    named: tuple[Pattern, ...] = (
        (_CALL, "function", _NEXT, Gap.NAME, _S, "```json", _S, "{"),
        (_CALL, Gap.NAME, _NEXT, _S, "{"),
    )
    return ToolFormat(
        name="deepseek",
        heads=(*((_CALLS, _S, *each) for each in named), *named),
        more=tuple((_S, *each) for each in named),
        tails=(
            *((_S, mark, _S, _DONE) for mark in ("```", "")),
            *((_S, mark, _S, _DONE, _S, _CALLED) for mark in ("```", "")),
        ),
        spelling=Spelling(
            begin=_CALLS,
            call=f"{begin}{{name}}{behind}",
            closed=closed,
            between="\n" if fenced else "",
            end=_CALLED,
        ),
        tokens=_DEEPSEEK_TOKENS,
    )


def _phi(source: str) -> ToolFormat:
    """Phi-4-mini's form, and Granite's: a list of JSON objects behind a mark."""
    closing = "<|/tool_call|>" if "<|/tool|>" in source else ""
    marks = ("<|tool_call|>", "functools")
    return ToolFormat(
        name="phi",
        heads=tuple(each for mark in marks for each in _objects(mark, _S, "[", _S)),
        more=_objects(_S, ",", _S),
        tails=((_S, "}"), (_S, "}", _S, "]"), (_S, "}", _S, "]", _S, "<|/tool_call|>")),
        spelling=Spelling(
            begin="<|tool_call|>[",
            call='{"name": "{name}", "arguments": ',
            closed="}",
            between=", ",
            end=f"]{closing}",
        ),
        tokens=("<|tool_call|>", "<|/tool_call|>"),
        in_system=_IN_SYSTEM.search(source) is not None,
    )


LLAMA = ToolFormat(
    name="llama",
    heads=_objects("<|python_tag|>", _S),
    first=_BARE,
    more=_MORE,
    tails=_BARE_TAILS,
    spelling=Spelling(call='{"name": "{name}", "parameters": ', closed="}"),
    tokens=("<|python_tag|>",),
    ends=("<|eom_id|>",),
    most=1,  # the template takes no more in a history either
)

GENERIC = ToolFormat(
    name="generic",
    first=_BARE,
    more=_MORE,
    tails=_BARE_TAILS,
    spelling=Spelling(call='{"name": "{name}", "arguments": ', closed="}", between="\n"),
)
# For a template that says nothing of tools.
DESCRIBED = ToolFormat(
    name="generic",
    first=_BARE,
    more=_MORE,
    tails=_BARE_TAILS,
    spelling=GENERIC.spelling,
    describes=False,
)

_MISTRAL_NAMED: tuple[Pattern, ...] = (
    ("[TOOL_CALLS]", _S, Gap.NAME, "[ARGS]", _S, "{"),
    ("[TOOL_CALLS]", _S, Gap.NAME, "[CALL_ID]", Gap.WORD, "[ARGS]", _S, "{"),
)
_MISTRAL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_MISTRAL_HEADS = (*_MISTRAL_NAMED, *_objects("[TOOL_CALLS]", _S, "[", _S))
_MISTRAL_TAILS: tuple[Pattern, ...] = (
    (_S, "}"),
    (_S, "}", _S, "]"),
    *((_S, ",", _S, '"id"', _S, ":", _S, '"', Gap.TEXT, '"', *end) for end in _ENDINGS),
)


def _mistral(source: str) -> ToolFormat:
    """Mistral's two forms: a list of objects, or name and arguments apart."""
    listed = Spelling(
        begin="[TOOL_CALLS] [" if "[TOOL_CALLS] [" in source else "[TOOL_CALLS][",
        call='{"name": "{name}", "arguments": ',
        closed="}",
        between=", ",
        end="]",
    )
    named = Spelling(call="[TOOL_CALLS]{name}[ARGS]", closed="")
    return ToolFormat(
        name="mistral",
        heads=_MISTRAL_HEADS,
        more=(*_objects(_S, ",", _S), *_MISTRAL_NAMED),
        tails=() if "[ARGS]" in source else _MISTRAL_TAILS,
        spelling=named if "[ARGS]" in source else listed,
        tokens=_MISTRAL_TOKENS,
        short_ids=True,
    )


def _gemma(opening: str, closing: str, quote: str, *ends: str) -> ToolFormat:
    """Gemma's own form, whose arguments are no JSON; JSON is read there as well."""
    return ToolFormat(
        name="gemma",
        heads=((opening, _S, "call:", Gap.NAME, _S, "{"),),
        more=((_S, opening, _S, "call:", Gap.NAME, _S, "{"),),
        spelling=Spelling(call=f"{opening}call:{{name}}", closed=closing),
        values="gemma",
        end=closing,
        quote=quote,
        tokens=(opening, closing, quote),
        ends=ends,
    )


GEMMA = _gemma("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")
FUNCTION_GEMMA = _gemma(
    "<start_function_call>",
    "<end_function_call>",
    "<escape>",
    "<start_function_response>",
)

# What a template has to hold, and the format that it implies; the first that fits counts.
_IMPLIED: tuple[tuple[str, Callable[[str], ToolFormat]], ...] = (
    ("<|tool_call>call:", lambda _: GEMMA),
    ("<start_function_call>", lambda _: FUNCTION_GEMMA),
    ("[TOOL_CALLS]", _mistral),
    ("<parameter=", lambda _: QWEN_CODER),
    (_CALLS, _deepseek),
    ("<|tool_call|>", _phi),
    ("<|/tool|>", _phi),
    ("<tool_call>", lambda _: HERMES),
    ("<|python_tag|>", lambda _: LLAMA),
    ('"parameters"', lambda _: LLAMA),
)
_TOOLS = re.compile(r"\btools\b")


def format_of(source: str | None) -> ToolFormat:
    """Return the format that the text of a chat template implies.

    One that does not speak of tools gets the generic form, which `prompt` describes; one that does,
    in a way that is not known, is left to describe them, and its replies are read as JSON.
    """
    if source is None or not _TOOLS.search(source):
        return DESCRIBED
    return next((make(source) for mark, make in _IMPLIED if mark in source), GENERIC)
