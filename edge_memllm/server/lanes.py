"""Threads for work that takes long: each kind has its own, so that one never waits for another.

A thread cannot be stopped. Whoever waits for one may give up, at a deadline or because its client
has gone; the thread stays taken until its work is done, so that there are never more of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Lock
from typing import TypeVar

from edge_memllm.engine.reply import as_exception
from edge_memllm.server.fields import ApiError

Found = TypeVar("Found")

_RETRY_SECONDS = 2


class Lane:
    """So many threads for one kind of work; `waiting` more may wait, or any number."""

    def __init__(self, name: str, threads: int, waiting: int | None = None) -> None:
        self._name = name
        self._room = None if waiting is None else threads + waiting
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"edge-memllm-{name}")
        self._lock = Lock()
        self._under_way = 0

    @property
    def busy(self) -> bool:
        """Whether some work is under way or waits, be it that nobody wants it any more."""
        return self._under_way > 0

    async def run(self, work: Callable[..., Found], *arguments: object) -> Found:
        """Return what `work` returns. Raises what it raises, and `ApiError` if there is no room."""
        return await asyncio.wrap_future(self._begin(work, arguments))

    def _begin(self, work: Callable[..., Found], arguments: tuple[object, ...]) -> Future[Found]:
        with self._lock:
            if self._room is not None and self._under_way >= self._room:
                raise ApiError(
                    429,
                    f"{self._under_way} {self._name} are under way or wait already. Try again.",
                    code="busy",
                    headers={"Retry-After": str(_RETRY_SECONDS)},
                )
            self._under_way += 1
        future = self._threads.submit(copy_context().run, _done, work, arguments)
        future.add_done_callback(self._end)
        return future

    def _end(self, _: Future[Found]) -> None:
        with self._lock:
            self._under_way -= 1


def _done(work: Callable[..., Found], arguments: tuple[object, ...]) -> Found:
    try:
        return work(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise as_exception(error) from error
