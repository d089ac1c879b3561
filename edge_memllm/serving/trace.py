"""Where the memory of a text's tokens came from: for each token that was fed, its record.

Kept by a choice while it grows. Knows tokens and record sources; nothing of steps or HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edge_memllm.record_source import RecordSource
from edge_memllm.serving.pieces import Origin, RecordUse
from edge_memllm.table import Fetched


class Trace:
    """The records of one text, from its first token on, in the order of its positions."""

    def __init__(self, prompt: Sequence[int], source: RecordSource) -> None:
        self._prompt = prompt
        self._source = source
        self._fresh: list[RecordUse] = []
        self._length = 0

    def note(
        self, start: int, tokens: Sequence[int], fetched: Fetched, before: Collection[int]
    ) -> None:
        """Note a step that fed `tokens` at `start`, behind what needed no computing.

        `before` are the tokens that other texts fed in the same step, as far as they come first.
        """
        for position in range(self._length, start):
            self._add(position, self._prompt[position], "kept")
        seen = set(before)
        for position, token in enumerate(tokens, start):
            if token in seen:
                self._add(position, token, "shared")
            else:
                self._add(position, token, "storage" if token in fetched.stored else "cache")
            seen.add(token)
        self._length = start + len(tokens)

    def take(self) -> tuple[RecordUse, ...]:
        """Return what was noted since this was called last."""
        found, self._fresh = tuple(self._fresh), []
        return found

    def _add(self, position: int, token: int, origin: Origin) -> None:
        _, size = self._source.locate(token)
        self._fresh.append(RecordUse(position, token, size, origin))
