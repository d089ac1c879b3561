"""What a caller may say about a generation, for calls that pass it on: their types, in one place.

What each means is said where it is used: `Model.stream` and `Session.stream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from edge_memllm.cancellation import Cancellation
from edge_memllm.sampling import Sampling


class TextOptions(TypedDict, total=False):
    """For going on with a text."""

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    sampling: Sampling | None
    ignore_eos: bool
    speculate: int


class PromptOptions(TextOptions, total=False):
    """For a prompt."""

    seed: int | None
    overlays: Sequence[str] | None


class CancellableTextOptions(TextOptions, total=False):
    """For going on with a text, with a way to end that."""

    cancellation: Cancellation | None


class CancellablePromptOptions(PromptOptions, total=False):
    """For a prompt, with a way to end that."""

    cancellation: Cancellation | None
