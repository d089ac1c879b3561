"""Whose turn it is in a session: one call at a time, and nothing freed under a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from edge_memllm.errors import RequestError
from edge_memllm.forking import ProcessLock
from edge_memllm.runtime_protocol import KVCache


class SessionTurn:
    """Guards one session's keys and values. Thread-safe.

    `use` keeps the model open for as long as its context lasts.
    """

    def __init__(self, cache: KVCache, use: Callable[[], AbstractContextManager[None]]) -> None:
        self.step = ProcessLock()  # held while keys and values are worked on, or freed
        self._call = ProcessLock()  # held by a call, and by a stream until it ends
        self._cache = cache
        self._use = use

    @contextmanager
    def call(self) -> Iterator[None]:
        """Be the only call for a while, on an open model. Raises `RequestError`."""
        if not self._call.acquire(blocking=False):
            raise RequestError(
                "The session is in use: another call on it has not ended. Let it end, close its "
                "iterator or cancel it; `fork`, before it, makes a second session."
            )
        try:
            with self._use():
                yield
        finally:
            self._call.release()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work on the keys and values, which are not freed meanwhile. Raises `RequestError`."""
        with self.step:
            if self._cache.closed:
                raise RequestError("The session is closed. Make another, or restore it.")
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Be a call that is one piece of work."""
        with self.call(), self.working():
            yield
