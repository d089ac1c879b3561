"""An artifact on storage: its manifest, and its files checked against the manifest.

Only files that the manifest names are ever opened. What they mean is the business of others.

The folder may come from anybody, and hold symbolic links, pipes or devices under innocent names. A
hard link is none of these but the file itself: how many names it has says nothing about where it
is from, and package managers give it several to save space. Where the system can, files are opened
relative to the folder's descriptor, so it stays the same folder when it is renamed or replaced.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import finalize

from edge_memllm.artifact.atomic import WholeFile, share_lock
from edge_memllm.artifact.manifest import MANIFEST_NAME, Manifest
from edge_memllm.artifact.open_files import READ_FLAGS, close_file, reading
from edge_memllm.artifact.strict_json import MAX_JSON_BYTES
from edge_memllm.errors import ArtifactError, CorruptionError, StorageError
from edge_memllm.progress import Progress

_FLAGS = READ_FLAGS | getattr(os, "O_NOFOLLOW", 0)


# Hashed while they are still in the processor's cache.
_CHUNK_BYTES = 1 << 18

_COPY_AGAIN = "The copy is incomplete or damaged; copy the folder again."


class Directory:
    """A folder kept open. The folder itself may be a symbolic link, files inside it may not.

    Raises `ArtifactError` when `path` is missing or is not a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isdir(path):  # unlike Path.is_dir, this never raises
            expected = "expected the folder of an exported model."
            if os.path.isfile(path) and path.suffix.lower() == ".gguf":
                raise ArtifactError(
                    f"{path}: is a GGUF file, {expected} Make one of it: edge-memllm export "
                    f"{path} OUT"
                )
            found = "is not a folder" if os.path.lexists(path) else "does not exist"
            raise ArtifactError(f"{path}: {found}, {expected}")
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            try:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise ArtifactError(f"{path}: cannot be opened ({error.strerror}).") from error
            share_lock(folder)  # nobody removes what is in use
            self._descriptor = folder
            self._free = finalize(self, close_file, folder)  # also if nobody calls `close`

    def open_file(self, name: str) -> int:
        """Open a file for reading and return its descriptor, which the caller closes.

        Raises `ArtifactError` unless `name` is a regular file; `name` must be a plain file name.
        """
        where = self.path / name
        try:
            file = self._open(name)
        except OSError as error:
            raise ArtifactError(f"{where}: {_reason(error)}") from error
        try:
            _refuse_unless_plain(os.fstat(file), where)
            if hasattr(os, "O_NONBLOCK"):
                os.set_blocking(file, True)  # reads are to wait, whatever the file system
        except OSError as error:
            close_file(file)
            raise ArtifactError(f"{where}: {_reason(error)}") from error
        except BaseException:
            close_file(file)
            raise
        return file

    def close(self) -> None:
        """Close the folder; closing twice is fine."""
        if self._descriptor is not None:
            self._free()
            self._descriptor = None

    def _open(self, name: str) -> int:
        if self._descriptor is not None:
            return os.open(name, _FLAGS, dir_fd=self._descriptor)
        path = self.path / name
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return os.open(path, _FLAGS)


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "the file is missing. The copy is incomplete; copy the folder again."
        case errno.ELOOP:
            return "the file is a symbolic link, expected a regular file. Copy the file itself."
        case _:
            return f"cannot be opened ({error.strerror})."


def _refuse_unless_plain(status: os.stat_result, where: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{where}: this is {_kind(status.st_mode)}, expected a regular file.")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


class Artifact:
    """An opened artifact. Thread-safe; close it, or use it in a with-statement."""

    def __init__(self, path: Path, directory: Directory, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._directory = directory

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        progress: Progress | None = None,
        *,
        check_graph: bool = True,
    ) -> Self:
        """Open the folder at `path`: check the manifest, and the size of every file it names.

        Also checks the sha256 digest of every file but the table, whose records are checked as
        they are read, and without `check_graph` also but the graph and its weights, which are
        checked as `read_bytes` reads them. `progress` is told bytes checked and to be checked,
        under "files". Raises `ArtifactError`, `CorruptionError` or `StorageError`.
        """
        directory = Directory(Path(path))
        try:
            artifact = cls(directory.path, directory, read_manifest(directory))
            manifest = artifact.manifest
            for name in manifest.files:
                close_file(artifact.open_file(name))
            later = {manifest.table.file}
            if not check_graph:
                later |= {manifest.graph.file, manifest.graph.external_data or ""}
            artifact._verify(later, progress)
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
            close_file(file)
            raise CorruptionError(
                f"{self.path / name}: {found} bytes, the manifest says {expected}. {_COPY_AGAIN}"
            )
        return file

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file the manifest names; see `read_checked`."""
        return bytes(self.read_checked(name))

    def read_checked(self, name: str) -> bytearray:
        """Read a file the manifest names: the bytes returned are those whose digest it says.

        Raises as `open_file` does, `CorruptionError` also for another digest, and `StorageError`
        when reading fails or there is no memory for it.
        """
        where, size = self.path / name, self.manifest.files[name].bytes
        with reading(self.open_file(name), where) as file:
            try:
                data, digest = bytearray(size), hashlib.sha256()
                with memoryview(data) as view:
                    done = 0
                    while count := file.readinto(view[done : done + _CHUNK_BYTES]):
                        digest.update(view[done : done + count])
                        done += count
            except MemoryError:
                raise StorageError(f"{where}: no memory for its {size:,} bytes.") from None
        self._compare(name, digest.hexdigest())
        return data

    def map_checked(self, name: str) -> mmap.mmap:
        """Map a file the manifest names, checked, for whoever alone can change it.

        Raises as `read_checked` does.
        """
        where = self.path / name
        with reading(self.open_file(name), where) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        digest = hashlib.sha256()
        with memoryview(mapped) as view:
            for start in range(0, len(view), _CHUNK_BYTES):
                digest.update(view[start : start + _CHUNK_BYTES])
        self._compare(name, digest.hexdigest())
        return mapped

    def copy_checked(self, name: str, path: Path) -> None:
        """Copy a file the manifest names to `path`, which is not there if its digest differs.

        Raises as `read_checked` does, and `StorageError` when writing fails.
        """
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
        with reading(self.open_file(name), self.path / name) as file, WholeFile(path) as copy:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                copy.write(buffer[:count])
            self._compare(name, digest.hexdigest())
            copy.publish()

    def verify_digests(self) -> None:
        """Read every file, the table too, and compare its sha256 digest with the manifest's.

        Raises `CorruptionError` naming the first file that differs.
        """
        self._verify(later=set(), progress=None)

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

    def _verify(self, later: set[str], progress: Progress | None) -> None:
        names = [name for name in self.manifest.files if name not in later]
        watched = _Watched(progress, sum(self.manifest.files[name].bytes for name in names))
        for name in names:
            self._compare(name, watched.sha256(self.open_file(name), self.path / name))

    def _compare(self, name: str, found: str) -> None:
        expected = self.manifest.files[name].sha256
        if found != expected:
            raise CorruptionError(
                f"{self.path / name}: sha256 is {found[:12]}, the manifest says {expected[:12]}. "
                f"{_COPY_AGAIN}"
            )


def read_manifest(directory: Directory) -> Manifest:
    """Read what describes a folder. Raises `ArtifactError` where nothing does."""
    where = directory.path / MANIFEST_NAME
    if not os.path.lexists(where) and os.path.lexists(directory.path / "config.json"):
        raise ArtifactError(
            f"{directory.path}: is a checkpoint, expected the folder of an exported model. Make "
            f"one of it: edge-memllm export {directory.path} OUT"
        )
    # One byte more than allowed: the parser refuses it, whatever size the file claims to have.
    with reading(directory.open_file(MANIFEST_NAME), where) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    return Manifest.from_json(data, str(where))


class _Watched:
    """Reads files one after the other, and tells how many of all their bytes that were."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._tell(0)

    def sha256(self, file: int, where: Path) -> str:
        """Return the hex digest of the whole file and close it."""
        with reading(file, where) as self._stream:
            return hashlib.file_digest(self, "sha256").hexdigest()

    def readable(self) -> bool:
        """As `file_digest` asks."""
        return True

    def readinto(self, target: bytearray) -> int:
        """Read into `target`, as `file_digest` wants it."""
        count = self._stream.readinto(target) or 0
        self._tell(count)
        return count

    def _tell(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress("files", self._done, self._total)
