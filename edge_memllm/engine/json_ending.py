"""What lets JSON of a small model end: closed objects, numbers of so many digits, no endless loop.

A grammar allows names after names, digits after digits and items after items, and a small model
takes them until its tokens are used up. Changes no schema so that more is accepted, and knows
nothing of grammars: `JsonEnding` only takes away from what one allows.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

MOST_DIGITS = 16  # in a row: more than a float64 tells apart
MOST_EXPONENT = 2  # digits; with them every number is one of float64
# Tokens of a cycle, how often it has to come in a row, and for how many tokens together.
LONGEST_CYCLE, LOOP_TIMES, LOOP_TOKENS = 32, 8, 64

# Or a string of so many tokens of so few different ones, unless half of them are digits.
WINDOW, FEWEST = 96, 16
# What is added to the logit of a string's end for each token beyond so many, and taken from that of
# another item for each beyond so many, in nats; and at most.
LONG_STRING, STRING_NATS = 64, 0.02
MANY_ITEMS, ITEM_NATS = 8, 0.25
MOST_NATS = 6.0

Schema: TypeAlias = Mapping[str, Any]

# Keywords whose schemas describe the value itself, together with whatever else stands there.
_CONDITIONS = ("else", "if", "not", "then")
_SAME = frozenset(("$ref", "allOf", "anyOf", "dependentSchemas", "oneOf", *_CONDITIONS))
_DEFINITIONS = ("$defs", "definitions")
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MAPS = ("dependentSchemas", "patternProperties", "properties", *_DEFINITIONS)
_SINGLE = ("additionalProperties", "contains", "items", "propertyNames", *_CONDITIONS)
_COMMA = re.compile(rb'"?([]}]*),')
_OTHERS = ("additionalProperties", "unevaluatedProperties")  # say what else an object may have


def closed(schema: Any, *, strict: bool = False) -> Any:
    """Return a schema whose objects have the properties that it names, and no others.

    Unless it says of an object what else there may be (`additionalProperties`), and is not
    `strict`. Objects that several schemas describe together (`allOf`, or `$ref` beside properties)
    stay open, as one of them does not know the properties of the others. What is accepted then is
    accepted by the schema as it was.
    """
    return _Closing(schema, strict).closed(schema)


class _Closing:
    """One schema: which of its definitions describe values together with others."""

    def __init__(self, schema: Any, strict: bool) -> None:
        self._strict = strict
        self._shared: set[str] = set()
        self._find_shared(False, schema)

    def closed(self, schema: Any, together: bool = False) -> Any:
        """Return a schema with closed objects; `together` with others, it stays as it is."""
        if not isinstance(schema, Mapping):
            return schema
        together = together or _parts(schema) > 1

        def below(each: Any, name: str, key: str | None) -> Any:
            if name in _DEFINITIONS:
                return self.closed(each, f"#/{name}/{key}" in self._shared)
            return self.closed(each, together and name in _SAME)

        found = {name: _mapped(name, value, below) for name, value in schema.items()}
        named = isinstance(schema.get("properties"), Mapping) and not together
        if named and (self._strict or not any(name in schema for name in _OTHERS)):
            found["additionalProperties"] = False
            found["properties"] = found["properties"] | _required(schema)
        return found

    def _find_shared(self, together: bool, schema: Any, *_: object) -> None:
        if not isinstance(schema, Mapping):
            return
        together = together or _parts(schema) > 1
        if together and isinstance(schema.get("$ref"), str):
            self._shared.add(schema["$ref"])
        for name, value in schema.items():
            _mapped(name, value, partial(self._find_shared, together and name in _SAME))


def _mapped(name: str, value: Any, change: Callable[[Any, str, str | None], Any]) -> Any:
    """Return a keyword's value with `change` made to each schema in it."""
    if name in _MAPS and isinstance(value, Mapping):
        return {key: change(each, name, key) for key, each in value.items()}
    if name in _LISTS and isinstance(value, list):
        return [change(each, name, None) for each in value]
    if name in _SINGLE and isinstance(value, Mapping):
        return change(value, name, None)
    return value


def _required(schema: Schema) -> dict[str, Any]:
    """Return schemas for names that an object must have and that nothing describes."""
    names = schema.get("required")
    if not isinstance(names, list) or "patternProperties" in schema:
        return {}
    return {name: {} for name in names if name not in schema["properties"]}


def _parts(schema: Schema) -> int:
    """Return how many schemas describe one value together at this place."""
    own = any(name in schema for name in ("properties", "patternProperties", *_OTHERS))
    several = schema.get("allOf")
    return (
        own
        + (len(several) if isinstance(several, list) else 0)
        + sum(name in schema for name in _SAME - {"allOf"})
    )


class TokenBytes:
    """The bytes of all tokens [V] of a vocabulary, as far as an ending needs to know them."""

    def __init__(self, spelled: list[bytes]) -> None:
        self.spelled = spelled
        self.digits = np.array([_leading_digits(each) for each in spelled], np.uint8)
        self.quotes = np.array([each[:1] == b'"' for each in spelled], np.bool_)
        self.closers = np.array([each[:1] in (b"]", b"}") for each in spelled], np.bool_)
        # How many arrays and objects a token closes before a comma; -1 where there is none.
        self.commas = np.array([_closed_before_comma(each) for each in spelled], np.int8)
        self.numeric = np.array([each.isdigit() for each in spelled], np.bool_)


def _leading_digits(data: bytes) -> int:
    return min(len(data) - len(data.lstrip(b"0123456789")), 255)


def _closed_before_comma(data: bytes) -> int:
    found = _COMMA.match(data)
    return -1 if found is None else len(found[1])


class JsonEnding:
    """One text of JSON under way: what of the tokens that a grammar allows lets it end.

    Where nothing would be left, the grammar has its way: a schema may ask for long numbers.
    """

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._text = _JsonText()
        self._loop = _Loop()

    def within(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return a mask of tokens [V] with those that lead on and on taken away."""
        tokens, text = self._tokens, self._text
        if self._loop.ends(text) and not text.escaped:
            closing = allowed & (tokens.quotes if text.in_string else tokens.closers)
            return closing if closing.any() else allowed
        if text.in_string:
            return allowed
        short = allowed & (tokens.digits <= text.digits_left)
        return short if short.any() else allowed

    def bias(self) -> NDArray[np.float32] | None:
        """Return what makes the end of a long string or array likelier, for logits [V]; or None."""
        tokens, text = self._tokens, self._text
        if text.string_tokens <= LONG_STRING and max(text.items, default=0) <= MANY_ITEMS:
            return None
        found = np.zeros(len(tokens.spelled), np.float32)
        if text.in_string:
            found[tokens.quotes] = _nats(text.string_tokens - LONG_STRING, STRING_NATS)
        for closed, items in enumerate(reversed(text.items)):
            if items > MANY_ITEMS:
                again = (tokens.commas == closed) & (tokens.quotes == text.in_string)
                found[again] -= _nats(items - MANY_ITEMS, ITEM_NATS)
        return found if found.any() else None

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        self._text.advance(self._tokens.spelled[token])
        self._loop.advance(token, self._text, numeric=bool(self._tokens.numeric[token]))


def _nats(beyond: int, each: float) -> float:
    return min(max(beyond, 0) * each, MOST_NATS)


class _JsonText:
    """Where in a JSON value the text is: in which string, how deep, how far in a number."""

    def __init__(self) -> None:
        self.in_string = False
        self.escaped = False  # behind a backslash in it
        self.items: list[int] = []  # of the arrays it is in, from the outside in; 0 for objects
        self.string_tokens = 0  # since the string began
        self._run = 0  # digits in a row
        self._exponent = False

    @property
    def depth(self) -> int:
        """How many arrays and objects it is in."""
        return len(self.items)

    @property
    def digits_left(self) -> int:
        """How many digits may come next."""
        return (MOST_EXPONENT if self._exponent else MOST_DIGITS) - self._run

    def advance(self, data: bytes) -> None:
        """Take the bytes of a token."""
        self.string_tokens += 1
        for byte in data:
            if self.in_string:
                self._in_string(byte)
            else:
                self._outside(byte)

    def _in_string(self, byte: int) -> None:
        if self.escaped:
            self.escaped = False
        elif byte == ord("\\"):
            self.escaped = True
        elif byte == ord('"'):
            self.in_string = False

    def _outside(self, byte: int) -> None:
        if byte in b"0123456789":
            self._run += 1
            return
        if byte in b"eE" and self._run:
            self._exponent = True
        elif byte not in b"+-":
            self._exponent = False
        self._run = 0
        if byte == ord('"'):
            self.in_string, self.string_tokens = True, 0
        elif byte in b"[{":
            self.items.append(byte == ord("["))
        elif byte in b"]}":
            self.items.pop()
        elif byte == ord(",") and self.items and self.items[-1]:
            self.items[-1] += 1


class _Loop:
    """Whether a text goes round in circles, and which string, array or object is to end for it."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._depths: list[int] = []  # behind each token
        self._same = [0] * (LONGEST_CYCLE + 1)  # by length: tokens in a row like that before
        self._window: deque[tuple[int, bool]] = deque(maxlen=WINDOW)  # of the string
        self._string = False  # the string that the text is in ends
        self._depth = 0  # what is at least so deep ends; 0 is nothing

    def ends(self, text: _JsonText) -> bool:
        """Whether what the text is in is to end."""
        return self._string or 0 < self._depth <= text.depth

    def advance(self, token: int, text: _JsonText, *, numeric: bool) -> None:
        """Take a token that was chosen, and where the text is with it."""
        self._string = self._string and text.in_string
        self._depth = self._depth if self._depth <= text.depth else 0
        self._string |= self._poor(token, text, numeric) and text.in_string
        tokens, same = self._tokens, self._same
        tokens.append(token)
        self._depths.append(text.depth)
        looped = 0  # tokens
        for cycle in range(1, min(len(tokens), LONGEST_CYCLE + 1)):
            same[cycle] = same[cycle] + 1 if token == tokens[-1 - cycle] else 0
            length = same[cycle] + cycle
            if length >= max(LOOP_TOKENS, LOOP_TIMES * cycle):
                looped = looped or length
        if looped and text.in_string and text.string_tokens >= looped:
            self._string = True
        elif looped:
            self._depth = max(1, min(self._depths[-looped:]))

    def _poor(self, token: int, text: _JsonText, numeric: bool) -> bool:
        """Take a token; whether the last ones of the string are few different ones."""
        if not text.string_tokens:
            self._window.clear()
        self._window.append((token, numeric))
        few = len(self._window) == WINDOW and len(set(self._window)) <= FEWEST
        return few and 2 * sum(digits for _, digits in self._window) < WINDOW
