"""Stopping a generation from outside: from another thread, a button, a signal handler."""

from __future__ import annotations

from edge_memllm.errors import GenerationCancelledError


class Cancellation:
    """A wish that work under way should end. Thread-safe; once made, it stays.

    Give it to one or more generations. Each looks at it before every step it computes: it ends
    within one token, or within one chunk of the prompt, by raising `GenerationCancelledError`.
    """

    def __init__(self) -> None:
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask for the end; calling it again, or when nothing is under way, is fine."""
        self._cancelled = True

    def check(self) -> None:
        """Raise `GenerationCancelledError` if the end was asked for."""
        if self._cancelled:
            raise GenerationCancelledError(
                "The generation was cancelled: what it gave before is all there is."
            )
