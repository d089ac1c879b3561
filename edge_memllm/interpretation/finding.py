"""What all findings have in common: they can be given as JSON has them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_DIGITS = 7  # what a float32 holds


class Finding:
    """Base of all findings; `as_dict` gives them as JSON has them."""

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as dicts, lists, texts and numbers, to seven significant digits."""
        found: dict[str, Any] = _plain(self)
        return found


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value
