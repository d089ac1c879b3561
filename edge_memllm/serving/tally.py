"""What an engine has done since it began, as plain numbers.

Counted by the engine's thread, read by any. Knows nothing of how they are shown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# How much of the expected time of a choice the last one decides.
_NEWS = 0.2


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A view of an engine: what goes on now, and sums since it began."""

    slots: int
    under_way: int  # choices that have a place
    queued: int  # choices that wait for one
    kv_bytes: int
    requests: int  # taken into the queue
    refused: int  # because the queue was full, or the engine is ending
    finished: int  # choices with a finish reason
    given_up: int  # choices cancelled, out of time or failed
    prompt_tokens: int  # that were computed
    reused_tokens: int  # of prompts, that did not need to be
    completion_tokens: int
    steps: int  # in which texts grew
    records_read: int
    bytes_read: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Tally:
    """The sums while they grow."""

    requests: int = 0
    refused: int = 0
    finished: int = 0
    given_up: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    choice_seconds: float = 1.0  # that a choice has a place, by the last ones

    def note_finished(self, seconds: float) -> None:
        """Count a choice that came to its end after so long in its place."""
        self.finished += 1
        self.choice_seconds += _NEWS * (seconds - self.choice_seconds)
