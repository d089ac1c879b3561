"""A reply under way: pieces go in from the engine's thread, and come out in any other.

Reads from a thread or from asyncio, not from both. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from threading import Condition
from typing import Self

from edge_memllm.serving.pieces import ReplyPiece, TokenScore


class Reply:
    """The pieces of all choices of one request, in the order they came about.

    Iterating waits for them; it ends after the last piece, or raises what went wrong. Leaving
    early must `cancel`: use it as a context manager, which does. One reader at a time.
    """

    def __init__(
        self, prompt: list[int], seed: int, choices: int, on_cancel: Callable[[], None]
    ) -> None:
        """Take what was asked, and what tells the engine that nobody wants the rest."""
        self.prompt = prompt
        self.seed = seed
        # There with the first piece of the first choice, where they were wished for.
        self.prompt_scores: tuple[TokenScore, ...] | None = None
        self._open = choices
        self._on_cancel = on_cancel
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
                self._open -= piece.finish_reason is not None
                self._ended = not self._open
                self._wake()

    def fail(self, error: Exception) -> None:
        """End the reply with what went wrong; the pieces so far can still be read."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
                self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[ReplyPiece]:
        while True:
            with self._changed:
                self._changed.wait_for(self._ready)
                piece = self._next()
            if piece is None:
                return
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
                await more.wait()
            elif piece is None:
                return
            else:
                yield piece

    def _ready(self) -> bool:
        return bool(self._pieces) or self._ended

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
