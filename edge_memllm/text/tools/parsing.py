"""Tool calls out of a reply, as it comes.

The result depends on the text alone, not on how it was cut into pieces. What is only nearly a call
stays text; what is one leaves nothing of its markup in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, NamedTuple, TypeAlias

from edge_memllm.text.tools.formats import NAME, Gap, Pattern, ToolFormat
from edge_memllm.text.tools.gemma_values import read_object
from edge_memllm.text.tools.parameters import read_parameters

_MOST_SPACE = 64
_WORD = re.compile(r"[a-zA-Z0-9]{1,64}")
_TEXT = re.compile(r'[^"\\\n]{1,64}')
_OPEN = {Gap.NAME: NAME, Gap.WORD: _WORD, Gap.TEXT: _TEXT}
_STRUCTURE = re.compile(r'["\\{}]')


@dataclass(frozen=True, slots=True)
class ReplyText:
    """A piece of what is said."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call, whose arguments follow."""

    index: int  # from 0, of the reply
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, which are a JSON object; `last` with the one that ends it."""

    index: int
    text: str
    last: bool


ReplyEvent: TypeAlias = ReplyText | CallBegins | CallArguments


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that is complete; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


_MORE = "more"  # has to come before it is known what it is


class _Call(NamedTuple):
    """The arguments of a call, and how many characters it has from their brace on."""

    arguments: str
    length: int


class _Head(NamedTuple):
    """What begins a call."""

    end: int  # behind the brace of its arguments
    name: str


class _State(Enum):
    TEXT = auto()
    ARGUMENTS = auto()  # of a call that has begun
    BEHIND = auto()  # a call


class ToolCallParser:
    """Reads one reply. `names` are those of the tools: a call of any other is text.

    Where arguments are no JSON, a mapping of the names to schemas says which of them are texts.

    A call is held back until it is known to be one. With `certain`, the arguments of one that
    begins exactly as the format spells it are handed out as they come: a grammar sees to it then
    that they are JSON. White space between text and calls is left out.
    """

    def __init__(
        self, format: ToolFormat, names: Collection[str], *, certain: bool = False
    ) -> None:
        self.calls = 0
        self._format = format
        self._names = frozenset(names)
        self._schemas = names if isinstance(names, Mapping) else {}
        self._certain = certain and format.values == "json"
        self._state = _State.TEXT
        self._held = ""
        self._space = ""  # behind the text so far
        self._said = False  # something, or a call
        self._behind = False  # a call: white space there is nobody's
        self._braces: _Braces | None = None
        marks = {str(pattern[0])[0] for pattern in format.heads}
        self._marks = re.compile(f"[{''.join(map(re.escape, sorted(marks)))}]") if marks else None

    def push(self, text: str) -> list[ReplyEvent]:
        """Take the next piece and return what is certain now."""
        return self._read(text, final=False)

    def flush(self) -> list[ReplyEvent]:
        """Return what was held back: the reply has ended."""
        found = self._read("", final=True)
        if self._space and not self.calls:
            found.append(ReplyText(self._space))
        return found

    def _read(self, text: str, *, final: bool) -> list[ReplyEvent]:
        self._held += text
        found: list[ReplyEvent] = []
        steps = {
            _State.TEXT: self._read_text,
            _State.ARGUMENTS: self._read_arguments,
            _State.BEHIND: self._read_behind,
        }
        while self._held and steps[self._state](found, final):
            pass
        return found

    # Each step takes what it can from what is held, and says whether another one may go on.

    def _read_text(self, found: list[ReplyEvent], final: bool) -> bool:
        for start, patterns in self._starts():
            head, partial = _longest(patterns, self._held, start)
            if partial and not final:
                self._say(found, start)
                return False
            if head is None or head.name not in self._names:
                continue
            call = self._call(start, head)
            if call is None:
                continue
            if isinstance(call, str) and final:
                break  # cut off: what is said of it stays text
            self._say(found, start)
            return self._take(found, head.name, head.end - 1 - start, call)
        self._say(found, len(self._held))
        return False

    def _starts(self) -> Iterator[tuple[int, Sequence[Pattern]]]:
        """Yield the places where a call may begin, and how."""
        space = len(self._held) - len(self._held.lstrip())
        if self._format.first and not self._said and space < len(self._held):
            yield space, (*self._format.first, *self._format.heads)
        if self._marks is not None:
            for mark in self._marks.finditer(self._held):
                yield mark.start(), self._format.heads

    def _read_behind(self, found: list[ReplyEvent], final: bool) -> bool:
        tail, partial = _longest(self._format.tails, self._held, 0)
        if partial and not final:
            return False
        at = 0 if tail is None else tail.end
        head, begun = _longest(self._format.more, self._held, at)
        if begun and not final:
            return False
        call = None
        if head is not None and head.name in self._names:
            call = self._call(at, head)
        if head is not None and call is not None and not (isinstance(call, str) and final):
            return self._take(found, head.name, head.end - 1, call)
        # What is left of the markup of a call that was cut off is nobody's text.
        self._drop(len(self._held) if final and (partial or begun) else at)
        self._state = _State.TEXT
        return True

    def _call(self, start: int, head: _Head) -> _Call | str | None:
        """Read the call with a head: None for what is none, `_MORE` while that is open."""
        brace = head.end - 1
        if self._certain and self._is_spelt(self._held[start:brace], head.name):
            return _Call("", 0)
        if self._format.values == "json":
            self._braces = self._braces or _Braces(brace)
            end = self._braces.end(self._held)
            text = None if end is None else self._held[brace:end]
        else:
            place = self._held.find(self._format.end, brace)
            end = None if place < 0 else place + len(self._format.end)
            text = None if place < 0 else self._read_values(head.name, self._held[brace:place])
        if end is None:
            return _MORE
        self._braces = None
        if text is None or not _is_object(text):
            return None
        return _Call(text, end - brace)

    def _read_values(self, name: str, text: str) -> str | None:
        """Return arguments in a form of their own as JSON; None for what are none."""
        if self._format.values == "tags":
            return read_parameters(text.removeprefix(">"), self._schemas.get(name, {}))
        return read_object(text)

    def _is_spelt(self, text: str, name: str) -> bool:
        """Whether a head is written as the grammar of calls has it."""
        spelling = self._format.spelling
        return text == (spelling.between if self.calls else spelling.begin) + spelling.head(name)

    def _take(self, found: list[ReplyEvent], name: str, brace: int, call: _Call | str) -> bool:
        """Hand out a call whose arguments begin at a brace, as far as it is known."""
        if isinstance(call, str):
            return False
        found.append(CallBegins(self.calls, name))
        self._said, self._behind, self._space = True, True, ""
        if not call.length:
            self._drop(brace)
            self._braces, self._state = _Braces(0), _State.ARGUMENTS
            return True
        found.append(CallArguments(self.calls, call.arguments, last=True))
        self._end_call(brace + call.length)
        return True

    def _read_arguments(self, found: list[ReplyEvent], final: bool) -> bool:
        assert self._braces is not None
        end = self._braces.end(self._held)
        text = self._held[:end]
        found.append(CallArguments(self.calls, text, last=end is not None))
        if end is None:
            self._held, self._braces.at = "", 0
            return False
        self._end_call(end)
        return True

    def _end_call(self, end: int) -> None:
        self._drop(end)
        self._state = _State.BEHIND
        self.calls += 1

    def _say(self, found: list[ReplyEvent], end: int) -> None:
        """Hand out text, but for the white space behind it, which may stand before a call."""
        text = self._space + self._held[:end]
        if self._behind:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            found.append(ReplyText(shown))
            self._said, self._behind = True, False
        self._drop(end)

    def _drop(self, end: int) -> None:
        self._held = self._held[end:]
        if end:
            self._braces = None


def parsed_reply(
    format: ToolFormat, names: Collection[str], text: str
) -> tuple[str, list[ToolCall]]:
    """Return what a whole reply says, and its calls."""
    parser = ToolCallParser(format, names)
    return collected([*parser.push(text), *parser.flush()])


def collected(events: Iterable[ReplyEvent]) -> tuple[str, list[ToolCall]]:
    """Return what the events of a reply come to."""
    said, names, arguments = "", dict[int, str](), dict[int, str]()
    for event in events:
        match event:
            case ReplyText(text):
                said += text
            case CallBegins(index, name):
                names[index], arguments[index] = name, ""
            case CallArguments(index, text):
                arguments[index] += text
    return said, [ToolCall(name, arguments[index]) for index, name in names.items()]


class _Braces:
    """Finds the end of a JSON object in a text that grows; `at` is how far it has looked."""

    def __init__(self, at: int) -> None:
        self.at = at
        self._depth = 0
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """Return the place behind the object; None while it is open."""
        while self.at < len(text):
            if self._escaped:
                self._escaped = False
                self.at += 1
                continue
            mark = _STRUCTURE.search(text, self.at)
            if mark is None:
                break
            self.at = mark.end()
            if mark[0] == "\\":
                self._escaped = self._quoted
            elif mark[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if mark[0] == "{" else -1
                if not self._depth:
                    return self.at
        self.at = len(text)
        return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _longest(patterns: Iterable[Pattern], text: str, start: int) -> tuple[_Head | None, bool]:
    """Return the longest pattern that stands at a place, and whether another may come."""
    found, begun = None, False
    for pattern in patterns:
        head = _matched(pattern, text, start)
        if head is None:
            begun = True
        elif head and (found is None or head.end > found.end):
            found = head
    return found, begun


def _matched(pattern: Pattern, text: str, at: int) -> _Head | Literal[False] | None:
    """Match a pattern at a place: False where it does not stand, None where the text ends in it."""
    name = ""
    for part in pattern:
        if isinstance(part, str):
            here = text[at : at + len(part)]
            if here != part:
                return None if at + len(here) == len(text) and part.startswith(here) else False
            at += len(part)
        elif part is Gap.SPACE:
            end = at
            while end < len(text) and text[end].isspace():
                end += 1
            if end - at > _MOST_SPACE:
                return False
            at = end
        else:
            match = _OPEN[part].match(text, at)
            if match is None:
                return None if at == len(text) else False
            if match.end() == len(text):
                return None
            name = match[0] if part is Gap.NAME else name
            at = match.end()
    return _Head(at, name)
