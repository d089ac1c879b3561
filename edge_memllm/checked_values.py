"""Values from outside, each taken with its type and range: numbers, and the fields of an object.

A bool is no number, and neither is what is not finite. Whoever reads an object says which error a
wrong value is, so that one reader serves files, requests and callers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from re import Pattern
from typing import Any, NoReturn, TypeAlias, TypeGuard

from edge_memllm.errors import RequestError

# From a key, the value found there and what is expected, to the error.
Refusal: TypeAlias = Callable[[str, object, str], Exception]

_SHOWN = 40


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; a bool is none."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` if it is an integer from `low` to `high`, else raise `RequestError`."""
    if is_integer(value) and low <= value and (high is None or value <= high):
        return value
    expected = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise wrong_value(name, value, f"an integer {expected}")


def check_number(name: str, value: object, low: float, high: float) -> float:
    """Return `value` if it is a number from `low` to `high`, else raise `RequestError`."""
    if is_number(value) and low <= value <= high:
        return value
    raise wrong_value(name, value, f"a number from {low} to {high}")


def wrong_value(name: str, value: object, expected: str) -> RequestError:
    """Return the error for a value that a caller gave."""
    # Python may refuse to write integers of more than 640 digits.
    huge = isinstance(value, int) and value.bit_length() > 2048
    shown = "a huge integer" if huge else f"{value!r:.{_SHOWN}}"
    return RequestError(f"{name} is {shown}, expected {expected}.")


def described(value: object, quote: Callable[[str], str]) -> str:
    """Describe a JSON value in a few words, whatever it holds; `quote` shortens a text."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer beyond 64 bits"
    return quote(value) if isinstance(value, str) else json.dumps(value)


class Fields:
    """Typed access to the values of one object.

    Every method returns the value under `key`, or raises the error that `refusal` makes of the
    key, what was found and what was expected. The optional ones return None for null and for what
    is not there.
    """

    def __init__(self, values: Mapping[str, object], refusal: Refusal) -> None:
        self._values: dict[str, Any] = dict(values)
        self._refusal = refusal

    @property
    def values(self) -> dict[str, Any]:
        """All of them, which the caller checks."""
        return self._values

    def value(self, key: str) -> object:
        """Return a value of any type; None when it is not there."""
        return self._values.get(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false; `default` for what is null or not there."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return self._integer(key, self.value(key), low, high)

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """Return an integer in [low, high], or None."""
        value = self.value(key)
        return None if value is None else self._integer(key, value, low, high)

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """Return a list of integers, each in [low, high]."""
        return tuple(self._integer(key, item, low, high) for item in self._list(key))

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """Return a number in [low, high] as a float, or None."""
        value = self.value(key)
        return None if value is None else self._number(key, value, low, high)

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        """Return a list of numbers, each in [low, high], as floats."""
        return tuple(self._number(key, item, low, high) for item in self._list(key))

    def text(self, key: str, pattern: Pattern[str], meaning: str) -> str:
        """Return a text that `pattern` matches whole; `meaning` says in words what it is."""
        return self._text(key, self.value(key), pattern, meaning)

    def optional_text(self, key: str, pattern: Pattern[str], meaning: str) -> str | None:
        """Return a text as `text` does, or None."""
        value = self.value(key)
        return None if value is None else self._text(key, value, pattern, meaning)

    def texts(self, key: str, pattern: Pattern[str], meaning: str) -> tuple[str, ...]:
        """Return a list of texts, each as `text` returns one."""
        return tuple(self._text(key, item, pattern, meaning) for item in self._list(key))

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return a text that is one of `choices`."""
        value = self.value(key)
        if not isinstance(value, str) or value not in choices:
            self._refuse(key, value, "one of " + ", ".join(choices))
        return value

    def optional_items(self, key: str, most: int) -> list[object] | None:
        """Return a list of at most `most` values that the caller checks, or None."""
        value = self.value(key)
        if value is not None and (not isinstance(value, list) or len(value) > most):
            self._refuse(key, value, f"a list of at most {most}")
        return value

    def mapping(self, key: str) -> dict[str, object]:
        """Return an object whose keys the caller checks."""
        value = self.value(key)
        if not isinstance(value, dict):
            self._refuse(key, value, "an object")
        return value

    def _list(self, key: str) -> list[object]:
        value = self.value(key)
        if not isinstance(value, list):
            self._refuse(key, value, "a list")
        return value

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if not is_integer(value) or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return value

    def _number(self, key: str, value: object, low: float, high: float) -> float:
        if not is_number(value) or not low <= value <= high:
            self._refuse(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def _text(self, key: str, value: object, pattern: Pattern[str], meaning: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self._refuse(key, value, meaning)
        return value

    def _refuse(self, key: str, value: object, expected: str) -> NoReturn:
        raise self._refusal(key, value, expected)
