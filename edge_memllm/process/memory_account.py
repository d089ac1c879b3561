"""One memory limit for several models of a process: what each may take, and who asks for more.

Plain sums; knows no model. Who loads models opens a share for each, and closes it behind them.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_memllm.process.forking import ProcessLock


class ByteBudget:
    """Bytes that several holders may take together. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._lock = ProcessLock()

    @property
    def held(self) -> int:
        """Bytes that are taken."""
        return self._held

    def exchange(self, held: int, wanted: int) -> int | None:
        """Hold `wanted` bytes instead of `held`. Returns None, or the bytes that would have fit.

        When they do not fit, nothing changes.
        """
        with self._lock:
            room = self.limit - self._held + held
            if wanted > room:
                return max(0, room)
            self._held += wanted - held
            return None


class MemoryAccount(ByteBudget):
    """Bytes that several models of one process may take together."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.make_room: Callable[[], bool] = lambda: False  # frees something, if it can


class MemoryShare:
    """What one model takes of an account: `model_bytes` of its own, and keys and values.

    `first_bytes` of those are kept for it from the beginning. As long as the model is open, its
    runtime asks here before it makes more of them; `score_bytes` is what attention works on per
    position. Until it is loaded, `loading_bytes` are taken where that is more, or all there is.
    """

    def __init__(
        self,
        account: MemoryAccount,
        model_bytes: int,
        first_bytes: int,
        score_bytes: int,
        loading_bytes: int = 0,
    ) -> None:
        self.score_bytes = score_bytes
        self.least_bytes = model_bytes + first_bytes
        self._loading_bytes = max(self.least_bytes, min(loading_bytes, account.limit))
        self._account = account
        self._model_bytes = model_bytes
        self._first_bytes = first_bytes
        self._held = 0  # of keys and values
        self._charged = 0
        self._lock = ProcessLock()

    @property
    def limit(self) -> int:
        """Bytes that keys and values could take if there were no other model."""
        return self._account.limit - self._model_bytes

    def open(self) -> bool:
        """Take what loading the model needs; False, and nothing is taken, if there is no room."""
        with self._lock:
            found = self._account.exchange(self._charged, self._loading_bytes) is None
            if found:
                self._charged = self._loading_bytes
            return found

    def settle(self) -> None:
        """Give back what only loading has needed."""
        with self._lock:
            least = self._model_bytes + max(self._first_bytes, self._held)
            if self._charged > least:
                self._account.exchange(self._charged, least)
                self._charged = least

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._account.exchange(self._charged, 0)
            self._held = self._charged = 0

    def exchange(self, held: int, wanted: int) -> int | None:
        """Hold `wanted` bytes of keys and values instead of `held`, as an account does.

        Where there is no room, the account is asked to make some.
        """
        while (left := self._exchanged(held, wanted)) is not None:
            if not self._account.make_room():
                return left
        return None

    def _exchanged(self, held: int, wanted: int) -> int | None:
        with self._lock:
            all_held = self._held + wanted - held
            charged = self._model_bytes + max(self._first_bytes, all_held)
            left = self._account.exchange(self._charged, charged)
            if left is None:
                self._held, self._charged = all_held, charged
                return None
            return max(0, left - self._model_bytes - self._held + held)
