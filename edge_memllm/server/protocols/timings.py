"""How long a reply takes, in llama.cpp's words: while it comes, and at its end.

The first token comes out of the prompt's last chunk, so the speed is that of the tokens behind it.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from edge_memllm.engine.reply import ChoiceStatistics, PromptProgress

Json = dict[str, Any]


def timings_of(statistics: ChoiceStatistics) -> Json:
    """Return what a choice took that is complete."""
    told, first = statistics, statistics.first_token_seconds
    drafts = {"draft_n": told.draft_tokens, "draft_n_accepted": told.accepted_tokens}
    return _timings(
        reused=told.reused_tokens,
        prompt=told.prompt_tokens - told.reused_tokens,
        prompt_seconds=(told.seconds if first is None else first) - told.queued_seconds,
        predicted=told.completion_tokens,
        predicted_seconds=0.0 if first is None else told.seconds - first,
    ) | (drafts if told.draft_tokens else {})


def progress_of(progress: PromptProgress) -> Json:
    """Return how much of a prompt is computed; `processed` has what was there already."""
    return {
        "total": progress.tokens,
        "cache": progress.reused,
        "processed": progress.computed,
        "time_ms": round(progress.seconds * 1e3),
    }


class RunningTimings:
    """What a choice has taken so far, by when its pieces came. Not thread-safe."""

    def __init__(self) -> None:
        self._prompt = PromptProgress(0, 0, 0, 0.0)
        self._first: float | None = None
        self._tokens = 0

    def note(self, progress: PromptProgress | None, token: int | None) -> None:
        """Take what a piece tells of the prompt, and its token."""
        if progress is not None:
            self._prompt = progress
        if token is not None:
            self._tokens += 1
            self._first = self._first or monotonic()

    def told(self) -> Json:
        """Return it."""
        prompt = self._prompt
        return _timings(
            reused=prompt.reused,
            prompt=prompt.computed - prompt.reused,
            prompt_seconds=prompt.seconds,
            predicted=self._tokens,
            predicted_seconds=0.0 if self._first is None else monotonic() - self._first,
        )


def _timings(
    *, reused: int, prompt: int, prompt_seconds: float, predicted: int, predicted_seconds: float
) -> Json:
    steps = max(0, predicted - 1)
    return {
        "cache_n": reused,
        "prompt_n": prompt,
        "prompt_ms": prompt_seconds * 1e3,
        "prompt_per_token_ms": _ratio(prompt_seconds * 1e3, prompt),
        "prompt_per_second": _ratio(prompt, prompt_seconds),
        "predicted_n": predicted,
        "predicted_ms": predicted_seconds * 1e3,
        "predicted_per_token_ms": _ratio(predicted_seconds * 1e3, steps),
        "predicted_per_second": _ratio(steps, predicted_seconds),
    }


def _ratio(amount: float, of: float) -> float:
    """Return a rate; 0 where there is nothing to divide by, which JSON has no other number for."""
    return amount / of if of > 0 else 0.0
