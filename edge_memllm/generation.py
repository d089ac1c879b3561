"""The innermost ring: prompts as ids in, new token ids out, one at a time.

The new token is the only loop: ids -> records -> logits -> token. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from edge_memllm.feeding import Feeder, Logits
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import Sampler
from edge_memllm.statistics import StepCosts
from edge_memllm.table import Table

FinishReason = Literal["stop", "length"]
PREFILL_CHUNK = 256


@dataclass(slots=True)
class TokenSequence:
    """One text under way: its prompt, how its tokens are chosen, and the tokens so far."""

    prompt: Sequence[int]
    sampler: Sampler
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def stop(self) -> None:
        """End the sequence from outside, for a stop string: it gets no further tokens."""
        self.finish_reason = "stop"

    def extend(self, logits: Logits) -> None:
        """Choose the next token from logits [V]; decide whether it is the last."""
        token = self.sampler.pick(logits)
        self.tokens.append(token)
        if token in self.eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"


def generate_tokens(
    runtime: Runtime,
    table: Table,
    sequences: Sequence[TokenSequence],
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    costs: StepCosts | None = None,
) -> Generator[int, None, None]:
    """Yield the number of each sequence whenever it has got a token, until all are finished.

    Prompts (at least one token each, checked ids) are prefilled one after the other, then all
    sequences advance together. Closing the iterator frees everything. `costs` is filled on the
    way.
    """
    with Feeder(runtime, table, len(sequences), prefill_chunk, costs) as feeder:
        # Grown once for the longest, not again and again while the prompts come in.
        feeder.cache.ensure(max(len(sequence.prompt) for sequence in sequences))
        for number, sequence in enumerate(sequences):
            sequence.sampler.observe(sequence.prompt)
            sequence.extend(feeder.prefill(number, sequence.prompt))
            yield number
        yield from _decode(feeder, sequences)


def _decode(feeder: Feeder, sequences: Sequence[TokenSequence]) -> Generator[int, None, None]:
    while active := [n for n, sequence in enumerate(sequences) if not sequence.finish_reason]:
        start = perf_counter()
        if len(active) < len(sequences):
            _park_finished(feeder, sequences)
        logits = feeder.decode([sequence.tokens[-1] for sequence in sequences])
        for number in active:
            sequences[number].extend(logits[number])
        feeder.costs.decode_tokens += len(active)
        feeder.costs.decode_seconds += perf_counter() - start
        yield from active


def _park_finished(feeder: Feeder, sequences: Sequence[TokenSequence]) -> None:
    """Set finished sequences back to length zero before a step.

    They keep their place in the batch, so they are fed like the others; there it costs next to
    nothing and cannot run over the context.
    """
    for number, sequence in enumerate(sequences):
        if sequence.finish_reason:
            feeder.cache.truncate(number, 0)
