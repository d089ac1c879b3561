"""Sessions of ONNX Runtime in a forked child, which inherits their memory, but not their threads.

There a session cannot compute, and cannot be freed: it would wait for threads that only the parent
has, or crash. So a child is told to load its own, and what it inherits stays until it ends.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any
from weakref import WeakSet

from edge_memllm.errors import EdgeMemLLMError


class Home:
    """The process that a session was made in, if it can be used in that one only."""

    def __init__(self, session: Any, device: str) -> None:
        self._process = os.getpid()
        threads = session.get_session_options().intra_op_num_threads
        self._bound = device != "cpu" or threads != 1
        if self._bound:
            _never_freed_in_a_child().add(session)

    def check(self, where: str) -> None:
        """Raise `EdgeMemLLMError` in a process that has not what the session computes with."""
        if self._bound and os.getpid() != self._process:
            raise EdgeMemLLMError(
                f"{where}: was loaded before this process was forked, and the threads that compute "
                "are the parent's. Load the model in each process, or with threads=1 on the CPU, "
                "which needs no others; or start processes by 'spawn' or 'forkserver'."
            )


@cache
def _never_freed_in_a_child() -> WeakSet[Any]:
    sessions: WeakSet[Any] = WeakSet()

    def keep() -> None:
        for session in list(sessions):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=keep)
    return sessions
