"""Figures on disk: one JSON file for each measurement, an entry for each run.

An entry tells what it was measured with, so that nothing is measured twice and nothing stale
stays. Knows nothing of what the figures mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_memllm.atomic import write_whole

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results" / "paper"
Entry = dict[str, Any]


class Results:
    """The file of one measurement."""

    def __init__(self, measurement: str, folder: Path = FOLDER) -> None:
        self._path = folder / f"{measurement}.json"

    def all(self) -> dict[str, Entry]:
        """Return every entry by the name of its run; none without a file."""
        if not self._path.exists():
            return {}
        found: dict[str, Entry] = json.loads(self._path.read_text("utf-8"))
        return found

    def is_current(self, run: str, key: Mapping[str, Any]) -> bool:
        """Whether there is an entry that was measured with all of `key`."""
        entry = self.all().get(run, {})
        return all(entry.get(name) == value for name, value in key.items())

    def put(self, run: str, entry: Entry) -> None:
        """Store an entry in place of what there was."""
        entries = {**self.all(), run: entry}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
