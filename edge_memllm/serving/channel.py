"""A reply under way: pieces go in from the engine's thread, and come out in any other.

Reads from a thread or from asyncio, not from both. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from threading import Condition
from time import monotonic
from typing import NamedTuple, Self

from edge_memllm.errors import DeadlineError, ServiceError
from edge_memllm.serving.pieces import ReplyPiece, TokenScore


class Deadline(NamedTuple):
    """When a reply has to be complete. Seconds, as `time.monotonic` counts them."""

    seconds: float  # that were given
    since: float
    tokens: int  # that all choices together may get

    @property
    def left(self) -> float:
        """Seconds until then, negative when it is over."""
        return self.since + self.seconds - monotonic()

    def error(self, came: int) -> DeadlineError:
        """Return what a reader is told when it is over."""
        return DeadlineError(
            f"The request was given {self.seconds:g} seconds, and {came} of {self.tokens} tokens "
            "had come. Ask for less, give it more time, or try again when less is asked."
        )


class Reply:
    """The pieces of all choices of one request, in the order they came about.

    Iterating waits for them; it ends after the last piece, or raises what went wrong. Leaving
    early must `cancel`: use it as a context manager, which does. One reader at a time. A deadline
    is kept by whoever reads: it holds also while the engine waits for a disk, or for ever.
    """

    def __init__(
        self,
        prompt: list[int],
        seed: int,
        choices: int,
        on_cancel: Callable[[], None],
        deadline: Deadline | None = None,
    ) -> None:
        """Take what was asked, and what tells the engine that nobody wants the rest."""
        self.prompt = prompt
        self.seed = seed
        # There with the first piece of the first choice, where they were wished for.
        self.prompt_scores: tuple[TokenScore, ...] | None = None
        self._open = choices
        self._on_cancel = on_cancel
        self._deadline = deadline
        self._came = 0  # tokens
        self._changed = Condition()
        self._pieces: deque[ReplyPiece] = deque()
        self._ended = False
        self._cancelled = False
        self._error: Exception | None = None
        self._waiting: Callable[[], object] | None = None  # what wakes a reader in asyncio

    @property
    def ended(self) -> bool:
        """Whether no more pieces come: all were put in, it was cancelled, or something failed."""
        return self._ended

    def cancel(self) -> None:
        """Give up the rest: the engine stops within one token. Twice, or after the end, is fine."""
        with self._changed:
            if self._ended:
                return
            self._ended = self._cancelled = True
            self._wake()
        self._on_cancel()

    def put(self, piece: ReplyPiece) -> None:
        """Add a piece, from the engine; dropped when the reply has ended."""
        with self._changed:
            if not self._ended:
                self._pieces.append(piece)
                self._came += piece.token is not None
                self._open -= piece.finish_reason is not None
                self._ended = not self._open
                self._wake()

    def fail(self, error: BaseException) -> None:
        """End the reply with what went wrong; the pieces so far can still be read."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, as_exception(error)
                self._wake()

    def over(self) -> bool:
        """Whether no more pieces come; ends it when its time is over."""
        if not self._ended and self._deadline is not None and self._deadline.left <= 0:
            self.fail(self._deadline.error(self._came))
        return self._ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[ReplyPiece]:
        while True:
            with self._changed:
                ready = self._changed.wait_for(self._ready, self._patience())
                piece = self._next() if ready else None
            if not ready:
                self._expire()
            elif piece is None:
                return
            else:
                yield piece

    async def __aiter__(self) -> AsyncIterator[ReplyPiece]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._waiting = lambda: loop.call_soon_threadsafe(more.set)
        while True:
            with self._changed:
                more.clear()
                ready = self._ready()
                piece = self._next() if ready else None
            if not ready:
                try:
                    async with asyncio.timeout(self._patience()):
                        await more.wait()
                except TimeoutError:
                    self._expire()
            elif piece is None:
                return
            else:
                yield piece

    def _ready(self) -> bool:
        return bool(self._pieces) or self._ended

    def _patience(self) -> float | None:
        """Return for how many seconds to wait for more."""
        return None if self._deadline is None else max(0.0, self._deadline.left)

    def _expire(self) -> None:
        """End the reply if its time is over, and tell the engine that nobody wants the rest."""
        if self.over():
            self._on_cancel()

    def _next(self) -> ReplyPiece | None:
        """Return the next piece, or None at the end; raises what went wrong."""
        if self._cancelled:
            return None
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiting is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._waiting()


def as_exception(error: BaseException) -> Exception:
    """Return what a reader can be told of anything that was raised.

    A panic of a library in Rust is no `Exception`, and would end whatever thread reads it.
    """
    if isinstance(error, Exception):
        return error
    found = ServiceError(f"A library failed on this request ({type(error).__name__}: {error}).")
    found.__cause__ = error
    return found
