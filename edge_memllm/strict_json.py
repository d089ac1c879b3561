"""JSON from files nobody has checked yet: one strict parser and typed access to its objects.

It refuses what the standard parser lets through (duplicate keys, NaN, numbers that overflow, deep
nesting, halves of surrogate pairs) and knows nothing of manifests or tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from re import Pattern
from typing import Any, NoReturn

from edge_memllm.errors import ArtifactError

MAX_JSON_BYTES = 1 << 20
# What walks a value afterwards may recurse; no file of ours or of a tokenizer comes near.
_MAX_DEPTH = 64


def parse_json_object(data: bytes, where: str, most: int = MAX_JSON_BYTES) -> dict[str, object]:
    """Parse `data` as one JSON object.

    Raises `ArtifactError` naming `where` when it is larger than `most` bytes, is not UTF-8, is not
    JSON, repeats a key, holds a number that is not finite or a text that is not Unicode, is nested
    too deeply, or is not an object.
    """
    if len(data) > most:
        raise ArtifactError(f"{where}: {len(data)} bytes of JSON, the limit is {most}.")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise ArtifactError(f"{where}: the JSON is nested too deeply.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, and what the hooks below refuse
        raise ArtifactError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: found {_kind(value)}, expected a JSON object.")
    _check_values(value, where)
    return value


def _check_values(value: object, where: str) -> None:
    """Raise `ArtifactError` for deep nesting and for half a surrogate pair, wherever it is."""
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.keys()
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not each.isascii():
                _check_text(each, where)
        if not inner:
            return
        level = inner
    raise ArtifactError(f"{where}: the JSON is nested too deeply.")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ArtifactError(
            f"{where}: the text {_quote(text)} is not Unicode: half of a surrogate pair."
        ) from None


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {_quote(key)} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


class Fields:
    """Typed access to one JSON object whose keys must be exactly `keys`.

    Every method returns the value under `key` or raises `ArtifactError` naming where, the key,
    what was found and what was expected. `bool` is never taken for a number.
    """

    def __init__(self, value: object, where: str, keys: Collection[str]) -> None:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: found {_kind(value)}, expected an object.")
        if missing := sorted(set(keys) - value.keys()):
            raise ArtifactError(f"{where}: key '{missing[0]}' is missing. Export the model again.")
        if unknown := sorted(value.keys() - set(keys)):
            raise ArtifactError(
                f"{where}: unknown key {_quote(unknown[0])}. "
                "Upgrade edge-memllm or export the model again."
            )
        self._value = value
        self._where = where

    @property
    def values(self) -> dict[str, Any]:
        """All of them, which the caller checks."""
        return self._value

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return self._integer(key, self._value[key], low, high)

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """Return an integer in [low, high], or None for null."""
        value = self._value[key]
        return None if value is None else self._integer(key, value, low, high)

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """Return a list of integers, each in [low, high]."""
        return tuple(self._integer(key, item, low, high) for item in self._list(key))

    def numbers(self, key: str, limit: float) -> tuple[float, ...]:
        """Return a list of finite numbers no larger than `limit` in magnitude, as floats."""
        return tuple(self._number(key, item, limit) for item in self._list(key))

    def texts(self, key: str, pattern: Pattern[str], meaning: str) -> tuple[str, ...]:
        """Return a list of strings, each as `text` returns one."""
        return tuple(self._text(key, item, pattern, meaning) for item in self._list(key))

    def optional_items(self, key: str, most: int) -> list[object] | None:
        """Return a list of at most `most` values that the caller checks, or None for null."""
        if self._value[key] is None:
            return None
        items = self._list(key)
        if len(items) > most:
            self._refuse(key, items, f"null or a list of at most {most}")
        return items

    def text(self, key: str, pattern: Pattern[str], meaning: str) -> str:
        """Return a string that `pattern` matches whole; `meaning` says in words what it is."""
        return self._text(key, self._value[key], pattern, meaning)

    def optional_text(self, key: str, pattern: Pattern[str], meaning: str) -> str | None:
        """Return a string as `text` does, or None for null."""
        return None if self._value[key] is None else self.text(key, pattern, meaning)

    def choice(self, key: str, choices: Collection[str]) -> str:
        """Return a string that is one of `choices`."""
        value = self._value[key]
        if not isinstance(value, str) or value not in choices:
            self._refuse(key, value, "one of " + ", ".join(choices))
        return value

    def mapping(self, key: str) -> dict[str, object]:
        """Return an object whose keys the caller checks."""
        value = self._value[key]
        if not isinstance(value, dict):
            self._refuse(key, value, "an object")
        return value

    def _list(self, key: str) -> list[object]:
        value = self._value[key]
        if not isinstance(value, list):
            self._refuse(key, value, "a list")
        return value

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            self._refuse(key, value, f"an integer from {low} to {high}")
        return value

    def _text(self, key: str, value: object, pattern: Pattern[str], meaning: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self._refuse(key, value, meaning)
        return value

    def _number(self, key: str, value: object, limit: float) -> float:
        if type(value) not in (int, float) or not -limit <= value <= limit:  # type: ignore[operator]
            self._refuse(key, value, f"a number from {-limit:g} to {limit:g}")
        return float(value)  # type: ignore[arg-type]

    def _refuse(self, key: str, value: object, expected: str) -> NoReturn:
        raise ArtifactError(f"{self._where}: {key} is {_kind(value)}, expected {expected}.")


def _kind(value: object) -> str:
    """Describe a JSON value in a few words; never longer than a line, whatever the file holds."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return _quote(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else _short(value)


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an integer beyond 64 bits"
    return str(value)


def _quote(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
