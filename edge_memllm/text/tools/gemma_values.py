"""Arguments as Gemma writes them, read as JSON: keys without quotes, texts between tokens.

`{city:<|"|>Paris<|"|>,days:3,exact:true}`; `<escape>` in the place of `<|"|>` is FunctionGemma's.
What is JSON already is read as well.
"""

from __future__ import annotations

import json
import re
from typing import Any

_QUOTES = ('<|"|>', "<escape>")
_SPACE = re.compile(r"\s*")
_KEY = re.compile(r"[^\s:,{}\[\]\"<>]{1,256}")
_PLAIN = re.compile(r"[^,{}\[\]<>\"]+")
_MOST_DEPTH = 64


def read_object(text: str) -> str | None:
    """Return the JSON of an object; None for what is none."""
    try:
        value, end = _value(text, 0, 0)
    except ValueError:
        return None
    if not isinstance(value, dict) or text[end:].strip():
        return None
    return json.dumps(value, ensure_ascii=False)


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    at = _skipped(text, at)
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deeply")
    if text.startswith("{", at):
        return _object(text, at + 1, depth)
    if text.startswith("[", at):
        return _list(text, at + 1, depth)
    quoted = _quoted(text, at)
    return _plain(text, at) if quoted is None else quoted


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at = _skipped(text, at)
    while not text.startswith("}", at):
        if found:
            at = _skipped(text, _past(",", text, at))
        key, at = _key(text, at)
        found[key], at = _value(text, _past(":", text, _skipped(text, at)), depth + 1)
        at = _skipped(text, at)
    return found, at + 1


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    at = _skipped(text, at)
    while not text.startswith("]", at):
        if found:
            at = _past(",", text, at)
        value, at = _value(text, at, depth + 1)
        found.append(value)
        at = _skipped(text, at)
    return found, at + 1


def _key(text: str, at: int) -> tuple[str, int]:
    quoted = _quoted(text, at)
    if quoted is not None:
        return quoted
    match = _KEY.match(text, at)
    if match is None:
        raise ValueError("no key")
    return match[0], match.end()


def _quoted(text: str, at: int) -> tuple[str, int] | None:
    for quote in _QUOTES:
        if text.startswith(quote, at):
            start = at + len(quote)
            end = text.index(quote, start)
            return text[start:end], end + len(quote)
    if text.startswith('"', at):
        value, end = json.JSONDecoder().raw_decode(text, at)
        return str(value), end
    return None


def _plain(text: str, at: int) -> tuple[Any, int]:
    """Read a number, true, false or null; any other word is a text."""
    match = _PLAIN.match(text, at)
    if match is None:
        raise ValueError("no value")
    word = match[0].strip()
    try:
        return json.loads(word, parse_constant=str), match.end()
    except ValueError:
        return word, match.end()


def _past(mark: str, text: str, at: int) -> int:
    if not text.startswith(mark, at):
        raise ValueError(f"no {mark}")
    return at + 1


def _skipped(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
