"""The innermost ring: prompts as ids in, new token ids out, one at a time.

The new token is the only loop: ids -> records -> logits -> token. Knows nothing of text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal

from edge_memllm.errors import Cancellation
from edge_memllm.feeding import PREFILL_CHUNKS, Feeder
from edge_memllm.runtime_protocol import Runtime, StepLogits
from edge_memllm.sampling import Sampler
from edge_memllm.statistics import GenerationStatistics, Meter, StepCosts
from edge_memllm.table.source import RecordSource
from edge_memllm.text.tokenization import Detokenizer, StopMatcher, Tokenizer

# Lengths of the endings that are looked up, longest first. Shorter ones recur in any text and are
# mostly followed by something else: with them, drafts cost more than they saved.
ENDINGS = (4, 3)
FIRST_DRAFTS = 4
# Rounds in a row without a right draft before a rest, and how long the first and longest are.
MISSES_BEFORE_REST = 2
FIRST_REST = 4
LONGEST_REST = 64

FinishReason = Literal["stop", "length"]


class PromptLookup:
    """Drafts for one text. `most` is the most draft tokens of a round."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._text: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram: place behind its last occurrence
        self._drafts = min(FIRST_DRAFTS, most)
        self._misses = 0
        self._rest = FIRST_REST
        self._resting = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        text, followed = self._text, self._followed
        for token in tokens:
            # Entered only now that something follows it: the ending itself is never its own match.
            for length in ENDINGS:
                if length <= len(text):
                    followed[tuple(text[-length:])] = len(text)
            text.append(token)

    def propose(self, limit: int) -> list[int]:
        """Return at most `limit` tokens that may come next; none where the text is new."""
        if self._resting:
            self._resting -= 1
            return []
        place = self._match()
        if place is None:
            return []
        text = self._text
        drafts: list[int] = []
        period = len(text) - place
        for step in range(min(self._drafts, limit)):
            # Behind the end of the text the drafts themselves go on, as in a repeated pattern.
            drafts.append(text[place + step] if step < period else drafts[step - period])
        return drafts

    def learn(self, proposed: int, accepted: int) -> None:
        """Take how many of the proposed drafts were right."""
        if not proposed:
            return
        if accepted:
            self._misses, self._rest = 0, FIRST_REST
            longer = 2 * self._drafts if accepted == proposed else accepted
            self._drafts = min(max(longer, 1), self._most)
            return
        self._drafts = 1
        self._misses += 1
        if self._misses >= MISSES_BEFORE_REST:
            self._resting = self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)

    def _match(self) -> int | None:
        """Return the place behind the last earlier occurrence of the longest ending."""
        text = self._text
        for length in ENDINGS:
            place = self._followed.get(tuple(text[-length:])) if length <= len(text) else None
            if place is not None:
                return place
        return None


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


@dataclass(frozen=True, slots=True)
class Piece:
    """What one new token added to the text; `text` may be empty while it is held back.

    `finish_reason` is None until the last piece: "stop" after an end-of-text token or a stop
    string (which is not shown), "length" at max_new_tokens or at the end of the context.
    """

    text: str
    token: int
    finish_reason: FinishReason | None = None
    statistics: GenerationStatistics | None = None


class TextAssembly:
    """The text of one sequence, as far as it is certain."""

    def __init__(self, tokenizer: Tokenizer, sequence: TokenSequence, stops: Sequence[str]) -> None:
        self._sequence = sequence
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)

    def advance(self) -> Piece:
        """Return the piece for the token the sequence has just got; may stop the sequence."""
        sequence = self._sequence
        token = sequence.tokens[-1]
        text = ""
        if token not in sequence.eos_token_ids:
            text = self._matcher.push(self._detokenizer.push(token))
        if sequence.finish_reason is not None:
            text += self._matcher.push(self._detokenizer.flush())
            text += self._matcher.flush()
        if self._matcher.stopped:
            sequence.stop()
        return Piece(text, token, sequence.finish_reason)


def stream_pieces(
    runtime: Runtime,
    table: RecordSource,
    tokenizer: Tokenizer,
    sequences: Sequence[TokenSequence],
    *,
    stops: Sequence[str],
    seed: int,
    prefill_chunk: int,
    speculate: int = 0,
    overlays: tuple[str, ...] = (),
    cancellation: Cancellation | None = None,
) -> Generator[tuple[int, Piece], None, None]:
    """Yield (number of the sequence, piece) for every new token of a batch.

    The very last piece carries the statistics of the whole batch; `seed`, and which `overlays` are
    over the table, are only reported there. The rest is as in `generate_tokens`.
    """
    meter = Meter(runtime, table, seed, overlays)
    tokens = generate_tokens(
        runtime,
        table,
        sequences,
        prefill_chunk=prefill_chunk,
        speculate=speculate,
        costs=meter.costs,
        cancellation=cancellation,
    )
    return assembled(tokens, sequences, tokenizer, stops, meter)


def assembled(
    tokens: Generator[int, None, None],
    sequences: Sequence[TokenSequence],
    tokenizer: Tokenizer,
    stops: Sequence[str],
    meter: Meter,
) -> Generator[tuple[int, Piece], None, None]:
    """Yield the pieces that tokens make; `tokens` yields whose turn it is, and is closed.

    The very last piece carries the statistics of `meter`.
    """
    assemblies = [TextAssembly(tokenizer, sequence, stops) for sequence in sequences]
    with closing(tokens):
        for number in tokens:
            piece = assemblies[number].advance()
            meter.note_token()
            if all(sequence.finish_reason for sequence in sequences):
                piece = replace(piece, statistics=meter.statistics())
            yield number, piece


async def in_thread(
    pieces: Generator[Piece, None, None], cancellation: Cancellation
) -> AsyncGenerator[Piece, None]:
    """Yield `pieces`, which look at `cancellation`, without holding up the event loop.

    The next piece is computed when it is asked for, so a slow reader is never run over. When the
    task is cancelled, or the iterator closed, the computing ends within one token, and is waited
    for: afterwards nothing of it is in use.
    """
    loop = asyncio.get_running_loop()
    worker = ThreadPoolExecutor(1, thread_name_prefix="edge-memllm-stream")
    try:
        while (piece := await loop.run_in_executor(worker, next, pieces, None)) is not None:
            yield piece
    finally:
        cancellation.cancel()
        closed = worker.submit(pieces.close)
        worker.shutdown(wait=False)
        await asyncio.shield(asyncio.wrap_future(closed))
