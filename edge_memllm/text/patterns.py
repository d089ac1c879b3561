"""Whether a regular expression of a tokenizer takes linear time, told from how it is written.

The library's engine goes back and tries again, which may take for ever: `(a+)+b` does on any word.
Here an expression is a choice of sequences, each of single characters and groups of bounded length.
At most one character may be repeated without bound, and behind it nothing may be wanted that could
be missing, so that no repetition is ever given up. What of the published patterns is written
otherwise, and is known to be harmless, is listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_CHARACTERS = 8192
MOST_LENGTH = 2048  # characters that the bounded parts of an expression match
MOST_WAYS = 4096  # to match the bounded parts of a sequence
_MOST_DEPTH = 16

# What may follow which repetition though it could be missing: the repetition is then shortened by
# one character, or gone over once and matched whole by another part of the same pattern.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}"
_HARMLESS = {
    (r"\s+", r"(?!\S)"),
    (r"\s+", "$"),
    (r"\s++", "$"),
    (r"\s*", r"[\r\n]+"),
    (r"\s*", r"[\r\n]"),
    (r"\s*", r"[\r\n]++"),
    *((f"{_UPPER}{but}]*", f"{_LOWER}{but}]+") for but in ("", r"&&[^\p{Han}]")),
}
# Published groups that break the rule, taken as they are: what they match at least, and at most.
_KNOWN_GROUPS: dict[str, tuple[int, int | None]] = {
    r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+": (1, None),
    r"(?=(\d{3})+(?!\d))": (0, 0),
    r"(?=(?:\d{3})*\b)": (0, 0),
    r"(A|B|C|D|E|F|G|H|I){1,4}": (1, 4),
    r"<sentinel:[0-9]+>": (12, None),
}
_QUANTIFIER = re.compile(r"([?*+]|\{(\d*)(,?)(\d*)\})([?+]?)")
_ESCAPE = re.compile(
    r"\\(?:[pP](?:\{\^?[A-Za-z_= -]{1,40}\}|[A-Z])|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}"
    r"|u[0-9A-Fa-f]{4}|[^\w\s]|[sSdDwWrntfvh])"
)
_EDGE = re.compile(r"\\[bBAzZ]|[$^]")
_GROUP = re.compile(r"\((\?:|\?[ims]+:|\?=|\?!|\?<=|\?<!|(?!\?))")
_AROUND = ("?=", "?!", "?<=", "?<!")
_FLAGS = re.compile(r"\(\?[ims]+\)")


class PatternError(Exception):
    """What is wrong with a pattern, to be read behind it."""


def check_pattern(expression: str) -> int:
    """Return how many characters it matches at least; raises `PatternError` if not linear."""
    if len(expression) > MOST_CHARACTERS:
        raise PatternError(f"has {len(expression)} characters, expected at most {MOST_CHARACTERS}.")
    parser = _Parser(expression.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t"))
    found = parser.choice(0)
    if parser.rest:
        raise PatternError(f"has a {parser.rest[0]!a} that nothing opens.")
    return found.least


@dataclass(frozen=True, slots=True)
class _Part:
    """What a part of an expression matches; `most` is None without a bound."""

    text: str
    least: int
    most: int | None
    ways: int = 1


class _Parser:
    def __init__(self, rest: str) -> None:
        self.rest = rest

    def choice(self, depth: int) -> _Part:
        """Read sequences up to a closing bracket or the end."""
        if depth > _MOST_DEPTH:
            raise PatternError("is nested too deeply.")
        before, found = self.rest, [self._sequence(depth)]
        while self.rest.startswith("|"):
            self.rest = self.rest[1:]
            found.append(self._sequence(depth))
        text = before[: len(before) - len(self.rest)]
        longest = [part.most for part in found if part.most is not None]
        most = max(longest) if len(longest) == len(found) else None
        return _Part(text, min(p.least for p in found), most, sum(p.ways for p in found))

    def _sequence(self, depth: int) -> _Part:
        least, most, ways = 0, 0, 1
        repeated: _Part | None = None
        while self.rest and self.rest[0] not in "|)":
            part = self._repeated(self._atom(depth))
            if repeated is not None and not self._may_follow(repeated, part):
                raise PatternError(
                    f"wants {part.text!a:.40} behind {repeated.text!a:.40}, which has no bound: "
                    "that may take for ever."
                )
            least += part.least
            if part.most is None:
                repeated = part
            else:
                most += part.most
                ways *= part.ways
            if most > MOST_LENGTH or ways > MOST_WAYS:
                raise PatternError("can match in too many ways.")
        return _Part("", least, None if repeated is not None else most, ways)

    @staticmethod
    def _may_follow(repeated: _Part, part: _Part) -> bool:
        optional = part.least == 0 and not part.text.startswith("(?") and not _EDGE.match(part.text)
        choice = part.text.endswith("?") and part.least == 0
        return optional or choice or (repeated.text, part.text) in _HARMLESS

    def _atom(self, depth: int) -> _Part:
        """Read a character, a class of them, a group, or what matches between characters."""
        for known, (least, most) in _KNOWN_GROUPS.items():
            if self.rest.startswith(known):
                self.rest = self.rest[len(known) :]
                return _Part(known, least, most)
        if match := _EDGE.match(self.rest) or _FLAGS.match(self.rest):
            return self._take(match.end(), 0)
        if match := _GROUP.match(self.rest):
            return self._group(match, depth)
        if match := _ESCAPE.match(self.rest):
            return self._take(match.end(), 1)
        if self.rest[0] == "[":
            return self._take(self._class_end(), 1)
        if self.rest[0] in "\\(*+?":
            raise PatternError(f"has {self.rest[:12]!a}, which is not known here.")
        return self._take(1, 1)

    def _group(self, match: re.Match[str], depth: int) -> _Part:
        before, self.rest = self.rest, self.rest[match.end() :]
        inner = self.choice(depth + 1)
        if not self.rest.startswith(")"):
            raise PatternError("has a bracket that nothing closes.")
        self.rest = self.rest[1:]
        text = before[: len(before) - len(self.rest)]
        if match[1] not in _AROUND:
            return _Part(text, inner.least, inner.most, inner.ways)
        if inner.most is None:
            raise PatternError(f"looks ahead or back without a bound, {text!a:.40}.")
        return _Part(text, 0, 0, inner.ways)

    def _repeated(self, atom: _Part) -> _Part:
        match = _QUANTIFIER.match(self.rest)
        if match is None:
            return atom
        self.rest = self.rest[match.end() :]
        sign, low, comma, high, more = match.groups()
        least = {"?": 0, "*": 0, "+": 1}.get(sign, int(low or 0))
        most: int | None = {"?": 1, "*": None, "+": None}.get(sign, int(high or low or 0))
        if (comma and not high) or (more == "+" and sign not in "?*+"):
            most = None  # to this engine `a{2}+` is `(?:a{2})+`
        text = atom.text + match.group()
        if atom.most == 1 == atom.least and atom.ways == 1:
            return _Part(text, least, most, 1 if most is None else max(1, most - least + 1))
        if atom.most is None or most is None or (most > 1 and atom.ways > 1):
            raise PatternError(f"repeats a group, {text!a:.40}: that may take for ever.")
        return _Part(text, least * atom.least, most * atom.most, atom.ways * (most - least + 1))

    def _take(self, count: int, length: int) -> _Part:
        text, self.rest = self.rest[:count], self.rest[count:]
        return _Part(text, length, length)

    def _class_end(self) -> int:
        """The place behind a class of characters, which may hold others."""
        depth, place, text = 0, 0, self.rest
        while place < len(text):
            letter = text[place]
            if letter == "\\":
                place += 1
            elif letter == "[":
                depth += 1
                if text.startswith(("[^]", "[]"), place):
                    raise PatternError("has a class of characters that begins with a ']'.")
            elif letter == "]":
                depth -= 1
                if not depth:
                    return place + 1
            place += 1
        raise PatternError("has a class of characters that nothing closes.")
