"""The innermost ring: prompts as ids in, new token ids out, one at a time.

The new token is the only loop: ids -> records -> logits -> token. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from edge_memllm.cancellation import Cancellation
from edge_memllm.feeding import Feeder
from edge_memllm.prefill import PREFILL_CHUNKS
from edge_memllm.record_source import RecordSource
from edge_memllm.runtime_protocol import Runtime, StepLogits
from edge_memllm.sampling import Sampler
from edge_memllm.speculation import PromptLookup
from edge_memllm.statistics import StepCosts

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class TokenSequence:
    """One text under way: its prompt, how its tokens are chosen, and the tokens so far."""

    prompt: Sequence[int]
    sampler: Sampler
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def left(self) -> int:
        """How many tokens it may still get."""
        return self.max_new_tokens - len(self.tokens)

    def stop(self) -> None:
        """End the sequence from outside, for a stop string: it gets no further tokens."""
        self.finish_reason = "stop"

    def extend(self, logits: StepLogits) -> None:
        """Choose the next token from logits [V]; decide whether it is the last."""
        token = self.sampler.pick(logits)
        self.tokens.append(token)
        if token in self.eos_token_ids:
            self.finish_reason = "stop"
        elif not self.left:
            self.finish_reason = "length"


def generate_tokens(
    runtime: Runtime,
    table: RecordSource,
    sequences: Sequence[TokenSequence],
    *,
    prefill_chunk: int = PREFILL_CHUNKS["cpu"],
    speculate: int = 0,
    costs: StepCosts | None = None,
    cancellation: Cancellation | None = None,
) -> Generator[int, None, None]:
    """Yield the number of each sequence whenever it has got a token, until all are finished.

    Prompts (at least one token each, checked ids) are prefilled one after the other, then all
    sequences advance together. With `speculate` a single sequence advances by up to that many
    drafts more at a time, and gets the tokens it would get without. Closing the iterator frees
    everything. `costs` is filled on the way; `cancellation` is looked at before every step.
    """
    if speculate and len(sequences) > 1:
        raise ValueError(f"speculate with {len(sequences)} sequences, expected one sequence.")
    with Feeder(runtime, table, len(sequences), prefill_chunk, costs, cancellation) as feeder:
        # Grown once for the longest, not again and again while the prompts come in.
        feeder.cache.ensure(max(len(sequence.prompt) for sequence in sequences))
        for number, sequence in enumerate(sequences):
            begin_text(feeder, sequence, feeder.prefill(number, sequence.prompt))
            yield number
        yield from go_on(feeder, sequences, speculate)


def begin_text(feeder: Feeder, sequence: TokenSequence, logits: StepLogits) -> None:
    """Choose the first token of a sequence from the logits [V] behind its prompt."""
    sequence.sampler.observe(sequence.prompt)
    sequence.extend(logits)
    _announce(feeder, [sequence])


def go_on(
    feeder: Feeder, sequences: Sequence[TokenSequence], speculate: int = 0
) -> Generator[int, None, None]:
    """Yield as `generate_tokens` does, for sequences that have their first token already."""
    if speculate:
        yield from _decode_with_drafts(feeder, sequences[0], PromptLookup(speculate))
    else:
        yield from _decode(feeder, sequences)


def _decode(feeder: Feeder, sequences: Sequence[TokenSequence]) -> Generator[int, None, None]:
    while active := [n for n, sequence in enumerate(sequences) if not sequence.finish_reason]:
        start = perf_counter()
        if len(active) < len(sequences):
            _park_finished(feeder, sequences)
        logits = feeder.decode([sequence.tokens[-1] for sequence in sequences])
        for number in active:
            sequences[number].extend(logits[number])
        _announce(feeder, sequences)
        feeder.costs.decode_tokens += len(active)
        feeder.costs.decode_seconds += perf_counter() - start
        yield from active


def _decode_with_drafts(
    feeder: Feeder, sequence: TokenSequence, lookup: PromptLookup
) -> Generator[int, None, None]:
    """Decode one sequence; a step verifies the last token and drafts of the next ones together.

    Each position is chosen from its own logits, with the random number plain decoding would use;
    the first draft that is not what was chosen ends the round, and what was chosen is kept.
    """
    lookup.extend([*sequence.prompt, *sequence.tokens])
    drafts: list[int] = lookup.propose(sequence.left - 1)
    costs = feeder.costs
    while not sequence.finish_reason:
        start = perf_counter()
        fed = int(feeder.cache.lengths[0])
        logits = feeder.verify([sequence.tokens[-1], *drafts])
        costs.draft_tokens += len(drafts)
        for accepted, draft in enumerate([*drafts, None]):
            sequence.extend(logits[accepted])
            token = sequence.tokens[-1]
            lookup.extend([token])
            right = token == draft
            if not right:
                feeder.cache.truncate(0, fed + 1 + accepted)
                lookup.learn(len(drafts), accepted)
                drafts = lookup.propose(sequence.left - 1)
                _announce(feeder, [sequence], drafts)
            costs.accepted_tokens += right
            costs.decode_tokens += 1
            costs.decode_seconds += perf_counter() - start
            yield 0
            start = perf_counter()
            if not right or sequence.finish_reason:
                break


def _announce(
    feeder: Feeder, sequences: Sequence[TokenSequence], drafts: Sequence[int] = ()
) -> None:
    """Name the tokens of the next step: storage can begin while the text is shown."""
    coming = [sequence.tokens[-1] for sequence in sequences if not sequence.finish_reason]
    if coming:
        feeder.announce([*coming, *drafts])


def _park_finished(feeder: Feeder, sequences: Sequence[TokenSequence]) -> None:
    """Set finished sequences back to length zero before a step.

    They keep their place in the batch, so they are fed like the others; there it costs next to
    nothing and cannot run over the context.
    """
    for number, sequence in enumerate(sequences):
        if sequence.finish_reason:
            feeder.cache.truncate(number, 0)
