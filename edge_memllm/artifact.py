"""An artifact on storage: its manifest, and its files checked against the manifest.

Only files that the manifest names are ever opened. What they mean is the business of others.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_memllm.directory import Directory
from edge_memllm.errors import ArtifactError, CorruptionError, StorageError
from edge_memllm.manifest import MANIFEST_NAME, Manifest
from edge_memllm.strict_json import MAX_JSON_BYTES

_COPY_AGAIN = "The copy is incomplete or damaged; copy the folder again."


class Artifact:
    """An opened artifact. Thread-safe; close it, or use it in a with-statement."""

    def __init__(self, path: Path, directory: Directory, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._directory = directory

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the folder at `path`: check the manifest, and the size of every file it names.

        Also checks the sha256 digest of every file but the table, whose records are checked as
        they are read. Raises `ArtifactError`, `CorruptionError` or `StorageError`.
        """
        directory = Directory(Path(path))
        try:
            artifact = cls(directory.path, directory, _read_manifest(directory))
            for name in artifact.manifest.files:
                os.close(artifact.open_file(name))
            artifact._verify(without=artifact.manifest.table.file)
        except BaseException:
            directory.close()
            raise
        return artifact

    def open_file(self, name: str) -> int:
        """Open a file the manifest names; return its descriptor, which the caller closes.

        Raises `ArtifactError` when it is not named or not a plain file, and `CorruptionError`
        when its size is not the manifest's.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path / name}: not listed in {MANIFEST_NAME}, not opened.")
        file = self._directory.open_file(name)
        found, expected = os.fstat(file).st_size, self.manifest.files[name].bytes
        if found != expected:
            os.close(file)
            raise CorruptionError(
                f"{self.path / name}: {found} bytes, the manifest says {expected}. {_COPY_AGAIN}"
            )
        return file

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file the manifest names. Raises as `open_file` does."""
        return _read(self.open_file(name), self.manifest.files[name].bytes, self.path / name)

    def verify_digests(self) -> None:
        """Read every file, the table too, and compare its sha256 digest with the manifest's.

        Raises `CorruptionError` naming the first file that differs.
        """
        self._verify(without=None)

    def close(self) -> None:
        """Close the folder; descriptors that were handed out stay open."""
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _verify(self, without: str | None) -> None:
        for name, spec in self.manifest.files.items():
            if name != without:
                found = _sha256(self.open_file(name), self.path / name)
                if found != spec.sha256:
                    raise CorruptionError(
                        f"{self.path / name}: sha256 is {found[:12]}, the manifest says "
                        f"{spec.sha256[:12]}. {_COPY_AGAIN}"
                    )


def _read_manifest(directory: Directory) -> Manifest:
    where = directory.path / MANIFEST_NAME
    # One byte more than allowed: the parser refuses it, whatever size the file claims to have.
    data = _read(directory.open_file(MANIFEST_NAME), MAX_JSON_BYTES + 1, where)
    return Manifest.from_json(data, str(where))


def _read(file: int, limit: int, where: Path) -> bytes:
    """Read up to `limit` bytes and close the file."""
    try:
        with os.fdopen(file, "rb") as stream:
            return stream.read(limit)
    except OSError as error:
        raise _unreadable(where, error) from error


def _sha256(file: int, where: Path) -> str:
    """Return the hex digest of the whole file and close it."""
    try:
        with os.fdopen(file, "rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: Path, error: OSError) -> StorageError:
    return StorageError(f"{where}: reading failed ({error.strerror}). Check the storage device.")
