"""The results of a sweep on disk: one JSON file per codec, whole or not there.

A result carries the settings it was measured with. Knows nothing of what its figures mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from edge_memllm.atomic import FolderLock, not_written, write_whole
from edge_memllm.errors import ArtifactError, RequestError

_FOLDER = "results"


class ResultsFolder:
    """DIR/results. Files appear by a rename; the bytes are on the disk before."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out / _FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it alone; the lock ends with the process, however it ends."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self._path.resolve())
        except OSError as error:
            raise not_written(self._path, error) from error
        with closing(lock):
            if lock.taken:
                raise RequestError(
                    f"{self._out}: another sweep is writing there. Wait for it, or choose another "
                    "folder."
                )
            yield

    def read(self, codec: str) -> dict[str, Any] | None:
        """Return a codec's result, None without one. Raises `ArtifactError` for a torn file."""
        path = self._path / f"{codec}.json"
        return _read(path) if path.exists() else None

    def write(self, codec: str, result: Mapping[str, Any]) -> None:
        """Store a codec's result in place of what there was."""
        write_whole(self._path / f"{codec}.json", _json(result))

    def all(self) -> dict[str, dict[str, Any]]:
        """Return every result by codec, in the order of their names."""
        return {path.stem: _read(path) for path in sorted(self._path.glob("*.json"))}


def load_results(out: Path) -> dict[str, Any]:
    """Return what the last sweep into `out` has put together, as `run_sweep` wrote it."""
    return _read(out / "results.json")


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write results.json."""
    write_whole(path, _json(summary))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings in which two results differ."""
    names = dict.fromkeys([*expected, *found])
    return [name for name in names if found.get(name) != expected.get(name)]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not a result of a sweep ({error}). Remove the file; it is measured again."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ArtifactError(
            f"{path}: not a result of a sweep: it states no settings. Remove the file; it is "
            "measured again."
        )
    return found
