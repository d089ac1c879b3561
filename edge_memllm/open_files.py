"""Files that are open for reading: closed without fuss, and every failure in our words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from edge_memllm.errors import StorageError


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
