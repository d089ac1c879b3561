"""The folder an export is built in, and how it takes the place of OUT in one step.

    OUT.partial    being built; locked by the export that builds it
    OUT            complete and verified, or not there
    OUT.replaced   what OUT was, for the moment between two renames
    OUT.refused    complete, and not good enough: whoever takes it all the same renames it

A crash at any point leaves at least one of OUT and OUT.replaced whole; the next export into OUT
puts things in order before it starts. Knows nothing of what an artifact holds but its manifest.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_memllm.artifact.atomic import FolderLock, reason, sync_folder
from edge_memllm.artifact.manifest import FORMAT, MANIFEST_NAME
from edge_memllm.errors import ExportError

_log = logging.getLogger(__name__)


class Staging:
    """Owns OUT.partial for one export; use it in a with-statement and end with `publish`.

    What is neither published nor set aside is removed. Raises `ExportError` when OUT may not be
    replaced, or when another export into OUT is running.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self._out = out
        self._aside = out.with_name(f"{out.name}.replaced")
        self._overwrite = overwrite

    def __enter__(self) -> Self:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._recover()
            self._refuse_what_is_there()
            _empty(self.path)
        except BaseException:
            with suppress(OSError):  # what was put there by others stays
                self.path.rmdir()
            self._lock.close()
            raise
        return self

    def publish(self) -> None:
        """Make the finished folder OUT. Everything in it must have reached the disk."""
        self._lock.sync()
        self._refuse_what_is_there()
        if _is_there(self._out):
            os.rename(self._out, self._aside)
            sync_folder(self._out.parent)
        os.rename(self.path, self._out)
        try:
            sync_folder(self._out.parent)
        except OSError:
            os.rename(self._out, self.path)  # a power cut might take it: not done
            raise
        if not _removed(self._aside):
            _log.warning("%s: could not be removed; the next export does it.", self._aside)

    def set_aside(self) -> Path | None:
        """Make the finished folder OUT.refused, in place of an older one; None if it cannot be.

        Everything in it must have reached the disk.
        """
        refused = self._out.with_name(f"{self._out.name}.refused")
        if _is_there(refused) and not _is_artifact(refused):
            return None
        try:
            _removed(refused)
            os.rename(self.path, refused)
            sync_folder(self._out.parent)
        except OSError:
            return None
        return refused

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with closing(self._lock):
            if kind is not None:
                with suppress(OSError):
                    self._recover()
                _removed(self.path)

    def _take_lock(self) -> FolderLock:
        """Make OUT.partial and lock it."""
        while True:
            try:
                self.path.mkdir(exist_ok=True)
                lock = FolderLock(self.path)
            except OSError as error:
                with suppress(OSError):  # unless there was something in it
                    self.path.rmdir()
                raise ExportError(
                    f"{self.path}: cannot be made a folder ({reason(error)}). An export into "
                    f"{self._out} is built there; move away what stands in the way."
                ) from error
            if lock.taken:
                lock.close()
                raise ExportError(
                    f"{self.path}: another export into {self._out} is running. Wait for it, or "
                    "export into another folder."
                )
            if lock.is_of(self.path):
                break
            lock.close()  # the export before us published the folder that we had opened
        if not lock.sure:
            _log.warning(
                "%s: this file system has no locks, so another export into %s at the same time "
                "would go unnoticed.",
                self.path,
                self._out,
            )
        return lock

    def _recover(self) -> None:
        """Undo or finish the swap of an export that died between its two renames."""
        if not self._aside.exists():
            return
        if not self._out.exists() and (self._aside / MANIFEST_NAME).exists():
            os.rename(self._aside, self._out)
            sync_folder(self._out.parent)
        else:
            _remove(self._aside)

    def _refuse_what_is_there(self) -> None:
        if not _is_there(self._out):
            return
        if not self._overwrite:
            raise ExportError(
                f"{self._out}: exists already. Choose another folder, or export with overwrite."
            )
        if not _is_artifact(self._out):
            raise ExportError(
                f"{self._out}: exists and is not an artifact, so it is not replaced. Choose "
                "another folder, or remove it yourself."
            )


def _is_there(path: Path) -> bool:
    """Whether something would be lost by renaming a folder to `path`."""
    if path.is_symlink() or not path.is_dir():
        return os.path.lexists(path)
    return any(path.iterdir())


def _is_artifact(path: Path) -> bool:
    """Whether this is a folder, no link, that holds one of our manifests, and files only."""
    if path.is_symlink() or not path.is_dir() or any(entry.is_dir() for entry in path.iterdir()):
        return False
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _removed(folder: Path) -> bool:
    """Remove a folder of files if it is there, in a second try if need be; whether it is gone."""
    for _ in range(2):
        with suppress(OSError):
            if folder.exists():
                _remove(folder)
            return True
    return False


def _remove(folder: Path) -> None:
    """Remove a folder of files; its manifest first, so that half a folder passes for none."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    _empty(folder)
    folder.rmdir()
    sync_folder(folder.parent)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            raise ExportError(
                f"{folder}: holds a folder, {entry.name}, that no export made. Move it away."
            )
        entry.unlink()
