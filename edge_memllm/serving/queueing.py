"""Who comes next: clients take turns, and each client's requests keep their order.

A client that asks much waits for itself, not others for it: with K clients waiting, the first of
each is taken after at most K - 1 others. Bounded. Knows nothing of what it holds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def waiting(self, client: str) -> int:
        """Return how many items of one client wait."""
        return len(self._lines.get(client, ()))

    def push(self, client: str, items: Iterable[Item]) -> None:
        """Append items to a client's line; a client who comes anew has its turn last."""
        self._lines.setdefault(client, deque()).extend(items)

    def pop(self) -> Item | None:
        """Take the first item of the client whose turn it is; None when nobody waits."""
        if not self._lines:
            return None
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out, and return, every item that is unwanted."""
        removed: list[Item] = []
        for client, line in list(self._lines.items()):
            kept = deque[Item]()
            for item in line:
                (removed if unwanted(item) else kept).append(item)
            self._lines[client] = kept
            if not kept:
                del self._lines[client]
        return removed
