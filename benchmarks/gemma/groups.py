"""Memory groups of Linux (cgroups, versions 1 and 2) in which a contender is held to a limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_memllm.process.limits import group_folders

_LIMITS = ("memory.max", "memory.limit_in_bytes")
_TRIES = 50


class NoGroupError(Exception):
    """No group can be made below that of this process."""


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Make a group of at most `limit` bytes, mapped files included; it is gone afterwards.

    Yields its folder: a process enters by writing its number to `cgroup.procs` there. Raises
    `NoGroupError` where the system has no such groups or lets nobody make one.
    """
    own = next(group_folders("memory"), None)
    if own is None:
        raise NoGroupError("This system has no memory groups.")
    folder = own / f"gemma-{limit}"
    try:
        folder.mkdir(exist_ok=True)
        file = next((folder / name for name in _LIMITS if (folder / name).exists()), None)
        if file is None:
            raise NoGroupError(f"{folder}: it has none of {', '.join(_LIMITS)}.")
        file.write_text(str(limit), "ascii")
    except OSError as error:
        why = f"{folder}: {error.strerror}. It takes root, or a group of one's own."
        raise NoGroupError(why) from error
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a group; its last process may still be on its way out."""
    for _ in range(_TRIES):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
