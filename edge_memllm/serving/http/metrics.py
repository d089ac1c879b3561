"""What the server counts, and its account in the text form that Prometheus reads.

Touched from the event loop only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from itertools import accumulate
from time import monotonic

from edge_memllm.serving.pieces import ReplyPiece
from edge_memllm.serving.tally import EngineStatistics
from edge_memllm.statistics import ProcessMemory

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "edge_memllm_"
# Seconds over which the speed is an average.
WINDOW = 10
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Histogram:
    """How often something took how long, in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def note(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples."""
        totals = list(accumulate(self._counts))
        for bound, total in zip((*map(str, _BOUNDS), "+Inf"), totals, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {totals[-1]}"


class Speed:
    """Tokens per second over the last seconds."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=WINDOW + 1)  # (second, tokens)

    def note(self) -> None:
        """Count a token."""
        now = int(monotonic())
        if not self._seconds or self._seconds[-1][0] != now:
            self._seconds.append((now, 0))
        self._seconds[-1] = (now, self._seconds[-1][1] + 1)

    def value(self) -> float:
        """Return the average over the whole seconds of the window."""
        now = int(monotonic())
        return (
            sum(count for second, count in self._seconds if now - WINDOW <= second < now) / WINDOW
        )


class Metrics:
    """What the engine does not count itself."""

    def __init__(self) -> None:
        self.under_way = 0  # requests, of any kind
        self.speed = Speed()
        self._responses: Counter[tuple[str, int]] = Counter()
        self._first_token = Histogram()
        self._queued = Histogram()
        self._reply = Histogram()

    def note_response(self, path: str, status: int) -> None:
        """Count a request that was answered; `path` is one of the server's own."""
        self._responses[path, status] += 1

    def note_piece(self, piece: ReplyPiece) -> None:
        """Count a token, and what its choice took if it is the last."""
        if piece.token is not None:
            self.speed.note()
        if piece.statistics is not None:
            self._queued.note(piece.statistics.queued_seconds)
            self._reply.note(piece.statistics.seconds)
            if piece.statistics.first_token_seconds is not None:
                self._first_token.note(piece.statistics.first_token_seconds)

    def text(self, engine: EngineStatistics, memory: ProcessMemory) -> str:
        """Return everything as one text."""
        return "\n".join([*self._server(), *_engine(engine), *_memory(memory), ""])

    def _server(self) -> Iterator[str]:
        name = PREFIX + "http_requests_total"
        yield from _head(name, "counter", "requests answered, by path and status")
        for (path, status), count in sorted(self._responses.items()):
            yield f'{name}{{path="{path}",status="{status}"}} {count}'
        yield from _sample("http_requests_under_way", "gauge", self.under_way, "requests under way")
        yield from _sample(
            "tokens_per_second", "gauge", self.speed.value(), f"tokens made, over {WINDOW} s"
        )
        for name, histogram, meaning in (
            ("queued_seconds", self._queued, "from being asked to having a slot"),
            ("first_token_seconds", self._first_token, "from being asked to the first token"),
            ("reply_seconds", self._reply, "from being asked to the end of a choice"),
        ):
            yield from _head(PREFIX + name, "histogram", meaning)
            yield from histogram.lines(PREFIX + name)


_ENGINE: Mapping[str, tuple[str, str, str]] = {
    "slots": ("slots", "gauge", "texts that can be under way at once"),
    "under_way": ("slots_busy", "gauge", "texts under way"),
    "queued": ("queued", "gauge", "texts that wait for a slot"),
    "kv_bytes": ("kv_bytes", "gauge", "bytes of keys and values"),
    "requests": ("accepted_total", "counter", "prompts taken into the queue"),
    "refused": ("refused_total", "counter", "prompts refused because the queue was full"),
    "finished": ("finished_total", "counter", "texts that came to their end"),
    "given_up": ("given_up_total", "counter", "texts cancelled, out of time or failed"),
    "prompt_tokens": ("prompt_tokens_total", "counter", "tokens of prompts that were computed"),
    "reused_tokens": ("reused_tokens_total", "counter", "tokens of prompts that were there still"),
    "completion_tokens": ("completion_tokens_total", "counter", "tokens made"),
    "steps": ("steps_total", "counter", "steps in which texts grew"),
    "records_read": ("records_total", "counter", "records of the table that were used"),
    "bytes_read": ("table_read_bytes_total", "counter", "bytes of records read from the table"),
}
_MEMORY: Mapping[str, tuple[str, str, str]] = {
    "anon_bytes": ("resident_anon_bytes", "gauge", "memory of the process's own"),
    "file_bytes": ("resident_file_bytes", "gauge", "mapped files in memory"),
}


def _engine(statistics: EngineStatistics) -> Iterator[str]:
    for field, (name, kind, meaning) in _ENGINE.items():
        yield from _sample(name, kind, getattr(statistics, field), meaning)


def _memory(memory: ProcessMemory) -> Iterator[str]:
    for field, (name, kind, meaning) in _MEMORY.items():
        value = getattr(memory, field)
        if value is not None:  # a system that does not tell
            yield from _sample(name, kind, value, meaning)


def _sample(name: str, kind: str, value: float, meaning: str) -> Iterator[str]:
    yield from _head(PREFIX + name, kind, meaning)
    yield f"{PREFIX}{name} {value}"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
