"""When a model that several threads use may be freed: once it is closed and nobody uses it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_memllm.errors import RequestError
from edge_memllm.forking import ProcessLock


class Lifetime:
    """Counts users; calls `release` once, after `end` and after the last user. Thread-safe."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = ProcessLock()
        self._users = 0
        self._ended = False
        self._process = os.getpid()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Be a user for a while. Raises `RequestError` after `end`."""
        with self._lock:
            self._leave_parent()
            if self._ended:
                raise RequestError("The model is closed. Load it again.")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._ended and self._users <= 0
            if last:
                self._release()

    def end(self) -> None:
        """Take no further users; ending twice is fine."""
        with self._lock:
            self._leave_parent()
            last = not self._ended and self._users == 0
            self._ended = True
        if last:
            self._release()

    def _leave_parent(self) -> None:
        """In a forked child: forget those who use it in threads of the parent."""
        if self._process != os.getpid():
            self._process, self._users = os.getpid(), 0
