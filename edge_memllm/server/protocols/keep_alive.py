"""How long a model stays loaded behind a request, in Ollama's words: `keep_alive`."""

from __future__ import annotations

import math
import re

from edge_memllm.checked_values import is_number
from edge_memllm.server.fields import BodyFields, refused, shown

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_PART = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)(h|ms|us|ns|m|s)")
_DURATION = re.compile(rf"([+-]?)((?:{_PART.pattern})+)")


def take_keep_alive(fields: BodyFields) -> float | None:
    """Take `keep_alive`: seconds, infinite for any negative number; None where nothing is said.

    It may be a number of seconds or a duration such as `5m` or `1h30m`. Raises `ApiError`.
    """
    value, where = fields.value("keep_alive"), fields.param("keep_alive")
    if value is None:
        return None
    seconds = _duration(value) if isinstance(value, str) else value
    if not is_number(seconds) or math.isnan(seconds):
        expected = "seconds, a duration like '5m', 0, or -1 for ever"
        raise refused(where, f"{where} is {shown(value)}, expected {expected}.")
    return math.inf if seconds < 0 else float(seconds)


def _duration(text: str) -> float | None:
    """Return the seconds of a duration as Go writes it; None for what is none."""
    found = _DURATION.fullmatch(text)
    if found is None:
        return float(text) if text in ("0", "-1") else None
    sign = -1.0 if found[1] == "-" else 1.0
    return sign * sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(found[2]))
