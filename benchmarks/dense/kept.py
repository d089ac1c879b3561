"""Figures kept one by one in a folder, so that a measurement goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returned when it was called for this name, now or before."""
    file = folder / f"{name}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = json.dumps(make())
        file.write_text(made + "\n", "utf-8")
    return json.loads(file.read_text("utf-8"))
