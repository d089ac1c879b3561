"""Locks and threads that a forked child has anew.

A child inherits what threads of its parent hold and what waits for them, and none of the threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class ProcessLock:
    """A lock that is open in a forked child, whoever holds it in the parent."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Do what `threading.Lock` does."""
        if self._process != os.getpid():
            self._process, self._lock = os.getpid(), Lock()
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """Open it."""
        self._lock.release()

    def locked(self) -> bool:
        """Whether somebody holds it, in this process."""
        return self._process == os.getpid() and self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Workers:
    """At most `count` threads, started when first needed; after `close` too. Thread-safe."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._process = os.getpid()
        self._lock = ProcessLock()
        self._threads: ThreadPoolExecutor | None = None

    def submit(
        self,
        work: Callable[_Arguments, _Result],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> Future[_Result]:
        """Have work done by one of them."""
        with self._lock:
            self._leave_parent()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._count, self._name)
            return self._threads.submit(work, *arguments, **options)

    def close(self) -> None:
        """Wait for the threads to end, if there are any; what is not begun is not done."""
        with self._lock:
            self._leave_parent()
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(cancel_futures=True)

    def _leave_parent(self) -> None:
        if self._process != os.getpid():
            self._process, self._threads = os.getpid(), None
