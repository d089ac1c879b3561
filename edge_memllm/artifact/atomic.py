"""Files and folders that appear whole: written beside their place, then one rename.

A reader, or a crash at any moment, finds what was there before or all of what is new. What is being
written has a name of ours and is locked, so that the next to write in that folder can tell what a
killed process has left, and remove it. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from edge_memllm.artifact.manifest import FileSpec
from edge_memllm.errors import RequestError, StorageError

Data = bytes | bytearray | memoryview

_DRAFT = re.compile(r"\.edge-memllm-[0-9a-f]{8}\.partial")
_CLOSED_TO_CHILDREN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSED_TO_CHILDREN
# O_NONBLOCK: opening a pipe must not wait for somebody at its other end.
_LEFT = _NO_LINK | getattr(os, "O_NONBLOCK", 0) | _CLOSED_TO_CHILDREN
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOSED_TO_CHILDREN
_OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")  # not on Windows
# Where nothing can be locked: who writes touches the file more often than this.
_ABANDONED_SECONDS = 24 * 3600.0

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENOENT, errno.ENOTDIR)
# What file systems say that have no such thing as forcing a folder to the disk, or let only some do
# it: CIFS before Linux 4.17, vboxsf, a few in user space.
_NO_FOLDER_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
)


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class WholeFile:
    """A file under way to `path`; use it in a with-statement and end with `publish`.

    What is not published leaves nothing. `mode` is that of the file, before the umask. Raises
    `RequestError` for what is there already, unless it is a file and `overwrite`, and
    `StorageError` when writing fails.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, mode: int = 0o666, overwrite: bool = True
    ) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._refuse_existing()
        clear_leftovers(self.path.parent)
        try:
            self._draft, self._file = _new_draft(self.path.parent, mode)
        except OSError as error:
            raise not_written(self.path, error) from error
        self._open = True

    def write(self, data: Data) -> int:
        """Write all of `data` behind what was written; return its bytes."""
        try:
            return write_all(self._file, data)
        except OSError as error:
            raise not_written(self.path, error) from error

    def seek(self, position: int) -> None:
        """Go on writing from this byte on."""
        try:
            os.lseek(self._file, position, os.SEEK_SET)
        except OSError as error:
            raise not_written(self.path, error) from error

    def publish(self) -> None:
        """Force the bytes to the disk, and give the file its name in place of what was there."""
        try:
            os.fsync(self._file)
            self._refuse_existing()
            if fcntl is None:  # where an open file cannot be renamed
                self._close()
            os.replace(self._draft, self.path)
        except OSError as error:
            raise not_written(self.path, error) from error
        self._close()
        try:
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"{self.path}: is written, but its folder could not be forced to the disk "
                f"({reason(error)}): a power cut may lose it. Check the disk."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and not self._open:
            return
        if fcntl is None:  # where an open file cannot be removed
            self._close()
        _remove(self._draft)
        self._close()

    def _close(self) -> None:
        """Close the file, and with it the lock; what is lost, fsync has said."""
        if self._open:
            self._open = False
            with suppress(OSError):
                os.close(self._file)

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise RequestError(
                f"{self.path}: there is a file already. Choose another name, or have it replaced "
                "(--force, overwrite=True)."
            )
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise RequestError(
                f"{self.path}: is not a file, so it is not replaced by one. Choose another name."
            )


class FolderLock:
    """A folder that one process at a time writes into; close it.

    The lock ends with the process, however it ends. Where folders or locks cannot be had (Windows,
    some network file systems) everybody gets it: `sure` says that nobody else has. Raises
    `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = os.open(path, _FOLDER | _NO_LINK) if _OPENS_FOLDERS else None
        locked = None if self._folder is None else try_lock(self._folder)
        self.taken = locked is False
        self.sure = locked is True

    def is_of(self, path: Path) -> bool:
        """Whether the folder has this name, now."""
        return path.is_dir() if self._folder is None else _is_named(path, self._folder)

    def sync(self) -> None:
        """Force the folder's entries to the disk, whatever its name is by now."""
        if self._folder is not None:
            _sync_open_folder(self._folder)

    def close(self) -> None:
        """Let go of it; twice is fine."""
        if self._folder is not None:
            with suppress(OSError):
                os.close(self._folder)
            self._folder = None


def write_whole(path: str | os.PathLike[str], content: str | Data) -> None:
    """Write a file in place of what was there. Raises as `WholeFile`."""
    with WholeFile(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.publish()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes `path` when the block ends well.

    `path` must not be there, or be empty. What the block does not finish leaves nothing. Raises
    `OSError`, also what the system says when `path` is there by then.
    """
    clear_leftovers(path.parent)
    draft, lock = _new_draft_folder(path.parent)
    try:
        with closing(lock):
            yield draft
            for file in draft.iterdir():
                sync_file(file)
            lock.sync()
            os.rename(draft, path)
            sync_folder(path.parent)
    finally:
        _remove(draft)


def move_whole(draft: Path, path: Path) -> None:
    """Force a file to the disk and rename it. Raises `OSError`."""
    sync_file(draft)
    os.replace(draft, path)
    sync_folder(path.parent)


def write_all(file: int, data: Data) -> int:
    """Write all of `data` to a descriptor, however little it takes at a time; return its bytes."""
    whole = memoryview(data)
    if not whole.nbytes:
        return 0
    left = whole.cast("B")  # of more dimensions, a slice would be rows
    while left:
        left = left[os.write(file, left) :]
    return whole.nbytes


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    file = os.open(path, os.O_RDWR | _CLOSED_TO_CHILDREN)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, on file systems that know such a thing."""
    if not _OPENS_FOLDERS:
        return
    try:
        folder = os.open(path, _FOLDER)
    except PermissionError:  # it may be written to, and not be read
        return
    try:
        _sync_open_folder(folder)
    finally:
        os.close(folder)


def try_lock(file: int) -> bool | None:
    """Lock an open file or folder; False if somebody else has, None where there are no locks.

    The lock ends with the descriptor, and so with the process, however it ends.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOTSUP, ENOLCK, or EBADF of NFS for what is open for reading
        return None
    return True


def share_lock(file: int) -> None:
    """Say that an open file or folder is in use: `try_lock` of anybody else is False meanwhile."""
    if fcntl is not None:
        with suppress(OSError):  # no locks there, or somebody writes into it
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in a folder. Never fails: it is not what was asked."""
    with suppress(OSError):
        with os.scandir(folder) as entries:
            left = [Path(each.path) for each in entries if _DRAFT.fullmatch(each.name)]
        for path in left:
            with suppress(OSError):
                _clear(path)


def not_written(path: Path, error: OSError) -> StorageError:
    """Return the error for a file that the system does not let us write."""
    return StorageError(f"{path}: cannot be written ({reason(error)}). {advice(error)}")


def reason(error: OSError) -> str:
    """Return what the system said."""
    return error.strerror or str(error) or type(error).__name__


def advice(error: OSError) -> str:
    """Return what to do when the system refuses to write."""
    if error.errno in _FULL:
        return "The disk is full: free some space, or choose another one."
    if error.errno in _FORBIDDEN:
        return "Choose a folder that you may write to."
    if error.errno in _NO_PLACE:
        return "Make the folder first, or choose another one."
    return "Check the disk and the folder."


def _sync_open_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _draft_name(folder: Path) -> Path:
    return folder / f".edge-memllm-{secrets.token_hex(4)}.partial"


# Whoever clears leftovers may take a draft for one before it is locked: then it is made anew.


def _new_draft_folder(folder: Path) -> tuple[Path, FolderLock]:
    """Make a folder that `clear_leftovers` leaves alone."""
    while True:
        draft = _draft_name(folder)
        draft.mkdir()
        try:
            lock = FolderLock(draft)
            if not lock.taken and lock.is_of(draft):
                return draft, lock
        except BaseException:
            _remove(draft)
            raise
        lock.close()


def _new_draft(folder: Path, mode: int) -> tuple[Path, int]:
    """Make a file that `clear_leftovers` leaves alone; return its path and its descriptor."""
    while True:
        draft = _draft_name(folder)
        file = os.open(draft, _NEW, mode)
        try:
            if try_lock(file) is not False and _is_named(draft, file):
                return draft, file
        except BaseException:
            _remove(draft)
            raise
        os.close(file)


def _remove(path: Path) -> None:
    """Remove a draft if it is there, in a second try if need be."""
    for _ in range(2):
        with suppress(FileNotFoundError):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError:
                continue
        return


def _is_named(path: Path, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(file))
    return False


def _clear(path: Path) -> None:
    """Remove a draft that nobody writes any more."""
    status = os.lstat(path)
    idle = time.time() - status.st_mtime
    if fcntl is None:  # where what is open cannot be removed
        if idle > _ABANDONED_SECONDS:
            _remove(path)
        return
    file = os.open(path, _LEFT | (_FOLDER if stat.S_ISDIR(status.st_mode) else os.O_RDWR))
    try:
        locked = try_lock(file)
        if locked or (locked is None and idle > _ABANDONED_SECONDS):
            _remove(path)
    finally:
        os.close(file)


def seal(path: Path) -> FileSpec:
    """Force a file to the disk; its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSpec(os.fstat(file.fileno()).st_size, digest)
