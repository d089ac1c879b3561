"""Figures and tables as people read them, and JSON as programs do. Prints nothing but JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def write_json(value: Mapping[str, Any]) -> None:
    """Print ``value`` as the one JSON object of a command."""
    print(json.dumps(value, indent=2, allow_nan=False))


def byte_count(count: float) -> str:
    """A size in decimal units, as drives are sold: ``1,536 B``, ``12.3 MB``, ``6.46 GB``."""
    if count < 10_000:
        return f"{count:,.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} TB"


def number(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width each, two spaces between, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
