"""What the pages on dense models and rows have in common; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
LAYERS = RESULTS / "layers.json"
CONTROL = RESULTS / "conversion-control.json"
RETROFIT = RESULTS / "retrofit.json"
FIRST = RESULTS / "conversion-first.json"
MODEL = "SmolLM2-135M-Instruct"
FOLDER_COMMAND = "python -m benchmarks.dense folder SmolLM2-135M-Instruct.Q4_1.gguf MODEL"

Stored = Mapping[str, Any]


def stored(file: Path) -> Stored | None:
    """Return the figures of a file; None where they are not there."""
    if not file.exists():
        return None
    found: Stored = json.loads(file.read_text("utf-8"))
    return found


def made_of(file: Path) -> str:
    """Say what a page is made of."""
    return f"Made by `python -m benchmarks.dense page` of `{file.name}`; edit neither."


def gap_words(gap: Stored) -> str:
    """Return a difference in nats with its interval."""
    return f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"


def is_beyond(gap: Stored) -> bool:
    """Whether zero is outside of the interval."""
    return bool(gap["low"] > 0 or gap["high"] < 0)
