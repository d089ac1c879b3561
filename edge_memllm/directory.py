"""Opens plain files of one folder, and nothing else.

A folder that somebody sent us may hold symbolic links, pipes or devices under innocent names. A
hard link is none of these but the file itself: how many names it has says nothing about where it
is from, and package managers give it several to save space. Where the system can, files are opened
relative to the folder's descriptor, so it stays the same folder when it is renamed or replaced.
This module knows nothing of what is in the files.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from weakref import finalize

from edge_memllm.errors import ArtifactError
from edge_memllm.open_files import close_file

# O_NONBLOCK: opening a pipe must not wait for a writer. Windows has only O_BINARY of these.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class Directory:
    """A folder kept open. The folder itself may be a symbolic link, files inside it may not.

    Raises `ArtifactError` when `path` is missing or is not a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isdir(path):  # unlike Path.is_dir, this never raises
            found = "is not a folder" if os.path.lexists(path) else "does not exist"
            raise ArtifactError(f"{path}: {found}, expected the folder of an exported model.")
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            try:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise ArtifactError(f"{path}: cannot be opened ({error.strerror}).") from error
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
