"""The prompts of the trials: distinct tokens, or stretches of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_memllm.benchmark.plan import Plan
from edge_memllm.errors import RequestError


def check_room(plan: Plan, vocabulary: int, context: int) -> None:
    """Raise `RequestError` when a model has too few tokens or positions for the plan."""
    longest = max(plan.contexts)
    if plan.text is None and longest > vocabulary:
        raise RequestError(
            f"A prompt of {longest} distinct tokens was asked for, the vocabulary has "
            f"{vocabulary}. Use shorter prompts, or --prompt-file."
        )
    if longest + plan.new_tokens > context:
        raise RequestError(
            f"{longest} prompt and {plan.new_tokens} new tokens were asked for, the model's "
            f"context holds {context}."
        )


def distinct_prompt(plan: Plan, length: int, number: int, vocabulary: int) -> list[int]:
    """Return distinct token ids, the same for the same plan, length and number.

    A prompt that repeats itself would find its records in memory and flatter the storage.
    """
    random = np.random.default_rng([plan.seed, length, number])
    ids: list[int] = random.choice(vocabulary, length, replace=False).tolist()
    return ids


def text_prompt(plan: Plan, length: int, number: int, tokens: Sequence[int]) -> list[int]:
    """Return a stretch of a text's tokens; the stretches of a plan are spread over the text.

    Raises `RequestError` when the text is too short.
    """
    if len(tokens) < length:
        raise RequestError(
            f"The text of --prompt-file has {len(tokens)} tokens, {length} were asked for."
        )
    place = min(number, plan.repeats - 1)
    start = (len(tokens) - length) * place // max(1, plan.repeats - 1)
    return list(tokens[start : start + length])
