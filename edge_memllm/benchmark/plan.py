"""What is to be measured: the trials, and the settings they are done with.

Refuses combinations that would not measure what they say. Imports next to nothing, as the command
line reads it for its help.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from edge_memllm.errors import RequestError
from edge_memllm.options import Option, positive_int, positive_ints

# Where the records come from, and the readers that read from there; the first is the default.
# No map is cold: the system does not drop pages that are mapped.
READERS = {
    "cold": ("pread",),
    "warm": ("pread", "mmap"),
    "direct": ("direct", "uring"),
    "resident": ("ram",),
}
CACHES = tuple(READERS)
FROM_STORAGE = ("cold", "direct")


def at_least_two(text: str) -> int:
    """Parse new tokens: the first belongs to the prefill, decoding needs another to be measured."""
    value = int(text)
    if value < 2:
        raise ArgumentTypeError(f"{text} is not 2 or more")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every variant is put through. Without a text, prompts are of distinct random tokens."""

    contexts: Annotated[
        tuple[int, ...],
        Option(
            "tokens of the prompt, so the position that decoding starts at",
            metavar="N[,...]",
            parse=positive_ints,
            several="list",
            flag="--context",
            also=("--prompt-tokens",),
        ),
    ] = (128,)
    new_tokens: Annotated[int, Option("tokens to decode", parse=at_least_two, metavar="N")] = 32
    repeats: Annotated[int, Option("rounds", parse=positive_int)] = 5
    seed: Annotated[int, Option("of the prompts")] = 0
    text: Annotated[
        str | None,
        Option(
            "take the prompts from this text instead of distinct random tokens",
            metavar="TEXT",
            reads_text=True,
            flag="--prompt-file",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One artifact in one state of its table, loaded with some settings."""

    name: str
    artifact: Path
    cache: str
    reader: str
    settings: dict[str, Any] = field(default_factory=dict)  # further keywords of `load`
    speculate: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self) | {"artifact": str(self.artifact)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Variant:
        """Make one from what `as_dict` returned."""
        return cls(**content | {"artifact": Path(content["artifact"])})

    @property
    def computation(self) -> tuple[Any, ...]:
        """What the output depends on: all but the way that records take into memory."""
        reading = ("record_cache", "hot_text", "memory_limit", "vram_limit")
        computing = {name: each for name, each in self.settings.items() if name not in reading}
        return (self.artifact, self.speculate, *sorted(computing.items()))


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure: variants, and which pairs of them (by place) to compare."""

    plan: Plan
    variants: Sequence[Variant]
    pairs: Sequence[tuple[int, int]] = ()


def readers_for(caches: Sequence[str], asked: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of a cache state and a reader to measure it with.

    Each reader asked for is used where it can be; a state that none of them can measure takes
    its default. Raises `RequestError` for a reader that no state has a use for.
    """
    for reader in asked:
        if not any(reader in READERS[cache] for cache in caches):
            raise RequestError(
                f"The reader '{reader}' cannot be measured with --cache {','.join(caches)}. "
                + " ".join(f"{cache}: {' or '.join(names)}." for cache, names in READERS.items())
            )
    return [
        (cache, reader)
        for cache in caches
        for reader in [each for each in asked if each in READERS[cache]] or READERS[cache][:1]
    ]


def check_maps(variants: Sequence[Variant]) -> None:
    """Raise `RequestError` for a cold variant beside one that maps the same table."""
    mapped = {each.artifact for each in variants if each.reader == "mmap"}
    if any(each.cache == "cold" and each.artifact in mapped for each in variants):
        raise RequestError(
            "--cache cold cannot be measured beside the reader 'mmap': pages that are mapped "
            "stay in the page cache. Measure them in two runs."
        )


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
