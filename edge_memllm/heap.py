"""Memory that was freed goes back to the system, where the allocator would keep it for later."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return what is free to the system. Does nothing where the C library has no such call."""
    if sys.platform.startswith("linux"):
        # glibc keeps up to some ten MB of what it frees, and what lies below something in use.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
