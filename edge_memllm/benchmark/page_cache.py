"""The page cache's part of one file: dropping it, and telling how much of the file is there."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edge_memllm.errors import RuntimeUnavailableError


@contextmanager
def evictor(path: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that drops the pages of the file at ``path`` from the page cache.

    Raises `RuntimeUnavailableError` where the system cannot do that. A disk or a hypervisor may
    keep a cache of its own behind the system's.
    """
    if not hasattr(os, "posix_fadvise"):
        raise RuntimeUnavailableError(
            f"--cache cold needs posix_fadvise, which {platform.system()} does not have. "
            "Measure with --cache warm or resident, or on Linux."
        )
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # pages that are not yet written cannot be dropped
        yield lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def cached_share(path: Path) -> float | None:
    """Return the share of a file's pages that are in the page cache; None where none can tell.

    Asks `mincore` about a mapping that is never touched, so asking brings nothing in.
    """
    try:
        ask = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of no name
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        states = np.zeros(pages, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        failed = ask(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(len(mapped)),
            ctypes.c_void_p(states.ctypes.data),
        )
        del view  # a mapping with views cannot be closed
    return None if failed else float(np.count_nonzero(states & 1) / pages)
