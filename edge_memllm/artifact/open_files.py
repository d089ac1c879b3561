"""Files opened for reading: plain ones only, closed without fuss, every failure in our words.

The counterpart of `atomic`, which writes them. Knows nothing of what is in a file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from edge_memllm.errors import ArtifactError, StorageError

# O_NONBLOCK: opening a pipe must not wait for a writer. Windows has only O_BINARY of these.
READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_regular(path: Path, expected: str) -> tuple[int, int]:
    """Open a regular file; return its descriptor and its size in bytes.

    Raises `ArtifactError` for what is not there or no regular file, saying that `expected`, as in
    "an overlay", was, and `StorageError` when the system fails.
    """
    try:
        file = os.open(path, READ_FLAGS)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: the file does not exist, expected {expected}.") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be opened ({error.strerror}).") from error
    try:
        status = os.fstat(file)
    except OSError as error:
        close_file(file)
        raise not_read(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        close_file(file)
        raise ArtifactError(f"{path}: this is not a regular file, expected {expected}.")
    return file, status.st_size


def close_file(file: int) -> None:
    """Close a file, or a folder, that nothing was written to: so nothing can be lost."""
    with suppress(OSError):
        os.close(file)


@contextmanager
def reading(file: int, where: str | Path) -> Iterator[BufferedReader]:
    """Yield a stream of an open file, and close it.

    Raises `StorageError`, naming `where`, when reading fails.
    """
    try:
        with os.fdopen(file, "rb", closefd=False) as stream:
            yield stream
    except OSError as error:
        raise not_read(where, error) from error
    finally:
        close_file(file)


def not_read(where: str | Path, error: OSError) -> StorageError:
    """Return the error for a file that the system does not let us read."""
    return StorageError(
        f"{where}: reading failed ({error.strerror or error}). Check the storage device."
    )
