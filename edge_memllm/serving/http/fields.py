"""The fields of a JSON object from a client, each taken with its type and range.

Whoever reads one calls `finish` at the end, which refuses what was not taken: so nothing a client
asks for is ever ignored. A field that is null counts as left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from edge_memllm.serving.http.api_error import refused
from edge_memllm.serving.http.parameters import Parameter

NOTHING: Mapping[str, Parameter] = {}
_SHOWN = 60


class Fields:
    """One JSON object; `path` is where it stands in the request, as `messages[0].`."""

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._path = path
        self._left = {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, value: object, where: str) -> Fields:
        """Take a value that has to be an object."""
        if not isinstance(value, dict):
            raise refused(where, f"{where} is {shown(value)}, expected an object.")
        return cls(value, f"{where}.")

    def param(self, name: str) -> str:
        """Return the name of a field as seen from the whole request."""
        return self._path + name

    def value(self, name: str) -> object:
        """Take a value of any type; None when it is not there."""
        return self._left.pop(name, None)

    def peek(self, name: str) -> object:
        """Look at a value of any type without taking it; None when it is not there."""
        return self._left.get(name)

    def required(self, name: str) -> object:
        """Take a value of any type that has to be there."""
        value = self.value(name)
        if value is None:
            where = self.param(name)
            raise refused(where, f"{where} is missing.", "missing_required_parameter")
        return value

    def text(self, name: str, most: int) -> str | None:
        """Take a text of at most `most` characters."""
        value = self.value(name)
        return None if value is None else checked_text(value, self.param(name), most)

    def flag(self, name: str, default: bool = False) -> bool:
        """Take true or false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Take an integer in [low, high]. 2.0 is one: JSON does not tell it from 2."""
        value = self.value(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (type(value) is not int or not low <= value <= high):
            self._refuse(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Take a number in [low, high]."""
        value = self.value(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            self._refuse(name, value, f"a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """Take one of several words."""
        value = self.value(name)
        if value is not None and (not isinstance(value, str) or value not in choices):
            self._refuse(name, value, " or ".join(f"'{each}'" for each in choices))
        return value

    def items(self, name: str, most: int) -> list[object] | None:
        """Take a list of at most `most` values."""
        value = self.value(name)
        if value is not None and (not isinstance(value, list) or len(value) > most):
            self._refuse(name, value, f"a list of at most {most}")
        return value

    def group(self, name: str) -> Fields | None:
        """Take an object."""
        value = self.value(name)
        return None if value is None else Fields.of(value, self.param(name))

    def pairs(self, name: str, most: int) -> Mapping[str, object]:
        """Take an object of at most `most` entries whose names the caller checks."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > most:
            self._refuse(name, value, f"an object of at most {most} entries")
        return value

    def finish(self, unsupported: Mapping[str, Parameter] = NOTHING) -> None:
        """Refuse what is left, but for what is `unsupported` and asks for nothing."""
        for name, value in self._left.items():
            where = self.param(name)
            if name not in unsupported:
                message = f"There is no parameter {shown(where)}. Leave it out."
                raise refused(where, message, "unknown_parameter")
            if not unsupported[name].asks_for_nothing(value):
                message = f"{where} is not supported by this server: {unsupported[name].meaning}."
                raise refused(where, f"{message} Leave it out.", "unsupported_parameter")

    def _refuse(self, name: str, value: object, expected: str) -> NoReturn:
        where = self.param(name)
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")


def checked_text(value: object, where: str, most: int) -> str:
    """Return a value that is text of at most `most` characters, all of which can be written."""
    if not isinstance(value, str):
        raise refused(where, f"{where} is {shown(value)}, expected text.")
    if len(value) > most:
        raise refused(where, f"{where} has {len(value)} characters, expected at most {most}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        message = f"{where} has half of a surrogate pair, expected text that can be UTF-8."
        raise refused(where, message) from None
    return value


def shown(value: object) -> str:
    """Describe a JSON value in a few words of ASCII, whatever a client has sent."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer beyond 64 bits"
    text: Any = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[-1]}"
