"""The fields of a JSON object from a client, each taken with its type and range.

Whoever reads one calls `finish` at the end, which refuses what was not taken: so nothing a client
asks for is ever ignored. A field that is null counts as left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

from edge_memllm.checked_values import Fields, described
from edge_memllm.serving.http.api_error import ApiError, refused
from edge_memllm.serving.http.parameters import Parameter

NOTHING: Mapping[str, Parameter] = {}
_SHOWN = 60


class BodyFields(Fields):
    """One JSON object; `path` is where it stands in the request, as `messages[0].`.

    Reading a value takes it. Every method raises `ApiError` naming the field.
    """

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        given = {name: value for name, value in values.items() if value is not None}
        super().__init__(given, partial(_refusal, path))
        self._path = path

    @classmethod
    def of(cls, value: object, where: str) -> BodyFields:
        """Take a value that has to be an object."""
        if not isinstance(value, dict):
            raise refused(where, f"{where} is {shown(value)}, expected an object.")
        return cls(value, f"{where}.")

    def param(self, name: str) -> str:
        """Return the name of a field as seen from the whole request."""
        return self._path + name

    def value(self, key: str) -> object:
        """Take a value of any type; None when it is not there."""
        return self._values.pop(key, None)

    def peek(self, name: str) -> object:
        """Look at a value of any type without taking it; None when it is not there."""
        return self._values.get(name)

    def required(self, name: str) -> object:
        """Take a value of any type that has to be there."""
        value = self.value(name)
        if value is None:
            where = self.param(name)
            raise refused(where, f"{where} is missing.", "missing_required_parameter")
        return value

    def bounded_text(self, name: str, most: int) -> str | None:
        """Take a text of at most `most` characters."""
        value = self.value(name)
        return None if value is None else checked_text(value, self.param(name), most)

    def group(self, name: str) -> BodyFields | None:
        """Take an object."""
        value = self.value(name)
        return None if value is None else BodyFields.of(value, self.param(name))

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
        for name, value in self._values.items():
            where = self.param(name)
            if name not in unsupported:
                message = f"There is no parameter {shown(where)}. Leave it out."
                raise refused(where, message, "unknown_parameter")
            if not unsupported[name].asks_for_nothing(value):
                message = f"{where} is not supported by this server: {unsupported[name].meaning}."
                raise refused(where, f"{message} Leave it out.", "unsupported_parameter")

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON does not tell 2.0 from 2
            value = int(value)
        return super()._integer(key, value, low, high)


def _refusal(path: str, key: str, value: object, expected: str) -> ApiError:
    where = path + key
    return refused(where, f"{where} is {shown(value)}, expected {expected}.")


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
    return described(value, _quoted)


def _quoted(text: str) -> str:
    found = json.dumps(text)
    return found if len(found) <= _SHOWN else f"{found[: _SHOWN - 4]}...{found[-1]}"
