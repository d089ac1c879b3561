"""Figures on disk: one JSON file for each measurement, an entry for each run.

An entry tells what it was measured with, so that nothing is measured twice and nothing stale
stays. What a network may have otherwise than the paper's is stored in words. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_memllm.artifact.atomic import write_whole

# Field of the configuration and its value.
CHANGES = {
    ("memory_norm", "shared"): "one memory norm for all layers",
    ("memory_source", "table"): "free table: rows trained directly",
    ("memory_source", "both"): "FFN(x_0) and a free table, summed",
    ("memory_sharing", "all_layers"): "one memory for all layers",
    ("compute_placement", "parallel"): "FFN-C parallel to attention",
    ("compute_form", "linear"): "FFN-C linear",
}
# Those that are computed no more, and the last commit that does.
FORMER = ("FFN-C parallel to attention", "FFN-C linear")
FORMER_COMMIT = "628331b"


def wider(factor: float) -> str:
    """Say that FFN-M has another width."""
    return f"FFN-M {factor:.3g} times as wide"


# Those that have a run of their own.
WANTED = (*CHANGES.values(), wider(2))


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
