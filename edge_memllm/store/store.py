"""The artifacts that were exported of sources, in the user's cache.

    models/NAME-0123abcd/            an entry, locked by who exports into it
        artifact/                    appears whole; whoever has it open shares its lock
        entry.json                   of which source, as it was then; its time is the last use

The digits are a digest of source and options, so that an entry is found without an index. One
without `entry.json` is no model: its export is under way, or was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from edge_memllm.artifact.atomic import FolderLock, not_written, write_whole
from edge_memllm.artifact.folder import Directory, read_manifest
from edge_memllm.artifact.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.progress import Progress
from edge_memllm.store.source import Source

HOME_VARIABLE = "EDGE_MEMLLM_HOME"

_OURS = "edge-memllm"
_RECORD = "entry.json"
_ARTIFACT = "artifact"
_DIGITS = 8
_LONGEST_NAME = 80
_POLL_SECONDS = 0.2


def home_folder() -> Path:
    """Return the folder that is ours in the user's cache, as the system has it.

    `EDGE_MEMLLM_HOME` in the environment is another. Raises `RequestError` where the user has none.
    """
    asked = os.environ.get(HOME_VARIABLE)
    if asked:
        return Path(os.path.abspath(asked))
    try:
        return _caches() / _OURS
    except RuntimeError as error:  # no home
        raise RequestError(
            f"There is no home folder to keep exported models in. Set {HOME_VARIABLE} to a folder."
        ) from error


def _caches() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    given = Path(os.environ.get(variable, ""))
    if given.is_absolute():  # a relative one is to be ignored, says the XDG specification
        return given
    return Path.home() / ("AppData/Local" if os.name == "nt" else ".cache")


@dataclass(frozen=True, slots=True)
class Record:
    """What an entry says of itself."""

    name: str
    source: str  # its location
    fingerprint: str  # of the source, when it was exported
    format_version: int
    made: int  # seconds since 1970

    @classmethod
    def of(cls, source: Source, fingerprint: str) -> Self:
        """Describe what is made of a source now."""
        return cls(source.name, source.location, fingerprint, FORMAT_VERSION, int(time.time()))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read it; None for what is not there, or no record of ours."""
        try:
            found = cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        texts = (found.name, found.source, found.fingerprint)
        numbers = (found.format_version, found.made)
        whole = all(isinstance(each, str) for each in texts)
        return found if whole and all(isinstance(each, int) for each in numbers) else None


@dataclass(frozen=True, slots=True)
class Entry:
    """One place of the store, with a model in it or without."""

    folder: Path

    @property
    def artifact(self) -> Path:
        """The folder of the artifact, if there is one."""
        return self.folder / _ARTIFACT

    @property
    def record(self) -> Record | None:
        """What was exported into it; None for nothing whole."""
        found = Record.read(self.folder / _RECORD)
        return found if (self.artifact / MANIFEST_NAME).is_file() else None

    @property
    def used(self) -> float | None:
        """When it was used last, in seconds since 1970; None for nothing whole."""
        with suppress(OSError):
            return (self.folder / _RECORD).stat().st_mtime
        return None

    @property
    def bytes(self) -> int:
        """What it takes on the disk, with what a killed export has left."""
        total = 0
        for folder, _, files in os.walk(self.folder):
            for name in files:
                with suppress(OSError):  # removed meanwhile
                    total += (Path(folder) / name).lstat().st_size
        return total

    @property
    def manifest(self) -> Manifest | None:
        """What the artifact says of itself; None where that cannot be read."""
        try:
            with closing(Directory(self.artifact)) as directory:
                return read_manifest(directory)
        except ArtifactError:
            return None

    def note_use(self) -> None:
        """Remember that it is used now, if that can be written down."""
        with suppress(OSError):
            os.utime(self.folder / _RECORD)

    def write(self, record: Record) -> None:
        """Say what was exported. Raises `StorageError`."""
        write_whole(self.folder / _RECORD, json.dumps(asdict(record), indent=2) + "\n")

    def clear_rest(self) -> None:
        """Remove half an artifact, which a killed removal has left. Raises `OSError`."""
        if os.path.lexists(self.artifact) and not (self.artifact / MANIFEST_NAME).is_file():
            shutil.rmtree(self.artifact)

    @contextmanager
    def exporting(self, progress: Progress) -> Iterator[None]:
        """Let one process at a time export into it: wait until nobody else does.

        `progress` is told of the waiting, under "waiting", and ends it by what it raises. Raises
        `StorageError` where nothing can be written.
        """
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = FolderLock(self.folder)
            except OSError as error:
                raise not_written(self.folder, error) from error
            with closing(lock):
                if not lock.taken and lock.is_of(self.folder):
                    yield
                    return
            progress("waiting", 0, 1)
            time.sleep(_POLL_SECONDS)

    def forget_if_empty(self) -> None:
        """Remove the place if nothing came into it."""
        with suppress(OSError):
            self.folder.rmdir()

    def remove(self) -> bool:
        """Remove it; False if a process has the model open, or exports it. Raises `OSError`."""
        with closing(FolderLock(self.folder)) as lock:
            if lock.taken:
                return False
            if not self.artifact.is_dir():
                shutil.rmtree(self.folder)
                return True
            with closing(FolderLock(self.artifact)) as opened:
                if opened.taken:
                    return False
                (self.folder / _RECORD).unlink(missing_ok=True)  # from here on it is no model
                shutil.rmtree(self.folder)
        return True


@dataclass(frozen=True, slots=True)
class Store:
    """All entries of one folder."""

    folder: Path

    @classmethod
    def of_user(cls) -> Self:
        """Return that of the user. Raises `RequestError` as `home_folder`."""
        return cls(home_folder() / "models")

    def entry(self, source: Source, options: Mapping[str, Any]) -> Entry:
        """Return the place for what is exported of a source with these options."""
        return self.at(source.name, source.location, options)

    def at(self, name: str, location: str, options: Mapping[str, Any]) -> Entry:
        """Return the place by the name and the location of a source."""
        asked = json.dumps([location, options], sort_keys=True, default=repr)
        digits = hashlib.sha256(asked.encode()).hexdigest()[:_DIGITS]
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_LONGEST_NAME].strip(".-")
        return Entry(self.folder / f"{plain or 'model'}-{digits}")

    def entries(self) -> list[Entry]:
        """Return all places, in the order of their folders' names."""
        if not self.folder.is_dir():
            return []
        return [Entry(each) for each in sorted(self.folder.iterdir()) if each.is_dir()]

    def names(self) -> dict[str, Entry]:
        """Return all places by name: that of the source, or of the folder where that is no name.

        Two models of one name have those of their folders, as has what is no model.
        """
        found = [(each, each.record) for each in self.entries()]
        often = Counter(record.name for _, record in found if record is not None)
        return {
            entry.folder.name if record is None or often[record.name] > 1 else record.name: entry
            for entry, record in found
        }

    def named(self, name: str) -> Entry | None:
        """Return the place that is meant: by its name, its folder's, or the path of its source.

        None for nothing of that name, or several.
        """
        by_name = self.names()
        if name in by_name:
            return by_name[name]
        places = {name, os.path.abspath(name)}
        found = [
            entry
            for entry in by_name.values()
            if entry.folder.name == name
            or ((record := entry.record) is not None and record.source in places)
        ]
        return found[0] if len(found) == 1 else None
