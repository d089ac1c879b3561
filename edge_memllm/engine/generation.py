"""One text under way: ids to new token ids, these to pieces of text, one at a time.

The new token is the only loop: ids -> records -> logits -> token. Several texts at once are the
engine's affair, which uses the same sequences and the same assembly of their text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, TypeVar

import numpy as np

from edge_memllm.engine.feeding import Feeder
from edge_memllm.engine.request import CheckedRequest, ScoreOf
from edge_memllm.engine.scores import TokenScore, drawn_score, token_scores
from edge_memllm.errors import Cancellation
from edge_memllm.runtime_protocol import StepLogits
from edge_memllm.sampling import Sampler
from edge_memllm.statistics import GenerationStatistics, Meter
from edge_memllm.text.tokenization import Detokenizer, StopMatcher, Tokenizer

# Lengths of the endings that are looked up, longest first. Shorter ones recur in any text and are
# mostly followed by something else: with them, drafts cost more than they saved.
ENDINGS = (4, 3)
FIRST_DRAFTS = 4
# Rounds in a row without a right draft before a rest, and how long the first and longest are.
MISSES_BEFORE_REST = 2
FIRST_REST = 4
LONGEST_REST = 64

Each = TypeVar("Each")
FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class TokenSequence:
    """One text under way: its prompt, how its tokens are chosen, and the tokens so far."""

    prompt: Sequence[int]
    sampler: Sampler
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    top: int | None = None  # so many likeliest tokens are told of with each, as a `TokenScore`
    top_of: ScoreOf = "model"
    tokens: list[int] = field(default_factory=list)
    score: TokenScore | None = None  # of the last token
    finish_reason: FinishReason | None = None

    @classmethod
    def of(
        cls, checked: CheckedRequest, number: int = 0, draws: np.random.Generator | None = None
    ) -> TokenSequence:
        """Return the text of this number that a request asks for; `draws` as in `Sampler`."""
        asked = checked.request
        sampler = Sampler(
            checked.sampling,
            checked.seed,
            number,
            penalties=asked.penalties,
            constraint=None if asked.constraint is None else asked.constraint(),
            draws=draws,
        )
        sampler.watched = asked.top is not None and asked.top_of == "sampling"
        return cls(checked.prompt, sampler, checked.limit, checked.ends, asked.top, asked.top_of)

    @property
    def left(self) -> int:
        """How many tokens it may still get."""
        return self.max_new_tokens - len(self.tokens)

    def stop(self) -> None:
        """End the sequence from outside, for a stop string: it gets no further tokens."""
        self.finish_reason = "stop"

    def extend(self, logits: StepLogits) -> int:
        """Choose the next token from logits [V], decide whether it is the last, and return it."""
        token = self.sampler.pick(logits)
        if self.top is not None and self.top_of == "sampling":
            self.score = drawn_score(token, self.sampler.drawn, self.top)
        elif self.top is not None:
            self.score = next(token_scores(logits[None], [token], self.top))
        self.tokens.append(token)
        if token in self.eos_token_ids:
            self.finish_reason = "stop"
        elif not self.left:
            self.finish_reason = "length"
        return token


def generate_tokens(
    feeder: Feeder, sequence: TokenSequence, logits: StepLogits, speculate: int = 0
) -> Generator[int, None, None]:
    """Yield each new token of the only sequence of a feeder, until it is finished.

    Its prompt is computed, and `logits` [V] are those behind it. With `speculate` it advances by up
    to that many drafts more at a time, and gets the tokens it would get without.
    """
    sequence.sampler.observe(sequence.prompt)
    token = sequence.extend(logits)
    _announce(feeder, sequence)
    yield token
    if speculate:
        yield from _decode_with_drafts(feeder, sequence, PromptLookup(speculate))
        return
    costs = feeder.costs
    while sequence.finish_reason is None:
        start = perf_counter()
        token = sequence.extend(feeder.decode([token])[0])
        _announce(feeder, sequence)
        costs.decode_tokens += 1
        costs.decode_seconds += perf_counter() - start
        yield token


def _decode_with_drafts(
    feeder: Feeder, sequence: TokenSequence, lookup: PromptLookup
) -> Generator[int, None, None]:
    """Yield the tokens behind the first; a step verifies the last one and drafts of the next ones.

    Each position is chosen from its own logits, with the random number plain decoding would use;
    the first draft that is not what was chosen ends the round, and what was chosen is kept.
    """
    lookup.extend([*sequence.prompt, *sequence.tokens])
    drafts = _drafts(feeder, sequence, lookup)
    costs = feeder.costs
    while not sequence.finish_reason:
        start = perf_counter()
        fed = int(feeder.cache.lengths[0])
        logits = feeder.verify([sequence.tokens[-1], *drafts])
        costs.draft_tokens += len(drafts)
        for accepted, draft in enumerate([*drafts, None]):
            token = sequence.extend(logits[accepted])
            lookup.extend([token])
            right = token == draft
            if not right:
                feeder.cache.truncate(0, fed + 1 + accepted)
                lookup.learn(len(drafts), accepted)
                drafts = _drafts(feeder, sequence, lookup)
                _announce(feeder, sequence, drafts)
            costs.accepted_tokens += right
            costs.decode_tokens += 1
            costs.decode_seconds += perf_counter() - start
            yield token
            start = perf_counter()
            if not right or sequence.finish_reason:
                break


def _drafts(feeder: Feeder, sequence: TokenSequence, lookup: PromptLookup) -> list[int]:
    """Propose tokens that may stand behind the last one, no more than can be taken back again."""
    return lookup.propose(min(sequence.left, feeder.cache.revocable(0)) - 1)


def _announce(feeder: Feeder, sequence: TokenSequence, drafts: Sequence[int] = ()) -> None:
    """Name the tokens of the next step: storage can begin while the text is shown."""
    if not sequence.finish_reason:
        feeder.announce([sequence.tokens[-1], *drafts])


class PromptLookup:
    """Drafts for one text, copied from earlier in it; `most` is the most tokens of a round."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._text: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram: place behind its last occurrence
        self._drafts = min(FIRST_DRAFTS, most)
        self._misses = 0
        self._rest = FIRST_REST
        self._resting = 0

    def follow(self, sequence: TokenSequence) -> None:
        """Append what a sequence has got since this was asked last, from its prompt on."""
        known = len(self._text) - len(sequence.prompt)
        if known < 0:
            self.extend(sequence.prompt)
        self.extend(sequence.tokens[max(known, 0) :])

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


@dataclass(frozen=True, slots=True)
class Piece:
    """What one new token added to the text; `text` may be empty while it is held back.

    `finish_reason` is None until the last piece: "stop" after an end-of-text token or a stop
    string (which is not shown), "length" at max_new_tokens or at the end of the context. `score`
    is there where `top` was asked for.
    """

    text: str
    token: int
    finish_reason: FinishReason | None = None
    statistics: GenerationStatistics | None = None
    score: TokenScore | None = None


class TextAssembly:
    """The text of one sequence, as far as it is certain."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sequence: TokenSequence,
        stops: Sequence[str],
        shown_tokens: Sequence[int] = (),
    ) -> None:
        self.sequence = sequence
        self._tokenizer = tokenizer
        self._stops = stops
        self._detokenizer = Detokenizer(tokenizer, shown_tokens)
        self._matcher = StopMatcher(stops)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text: one that came, or the token that it is."""
        sequence = self.sequence
        if self._matcher.stopped or sequence.finish_reason != "stop" or not self._stops:
            return self._matcher.found
        spelt = self._tokenizer.spelling(sequence.tokens[-1])
        return spelt if spelt in self._stops else None

    def advance(self) -> str:
        """Return what the token adds that the sequence has just got; may stop the sequence."""
        sequence = self.sequence
        token = sequence.tokens[-1]
        text = ""
        if token not in sequence.eos_token_ids:
            text = self._matcher.push(self._detokenizer.push(token))
        if sequence.finish_reason is not None:
            text += self._matcher.push(self._detokenizer.flush())
            text += self._matcher.flush()
        if self._matcher.stopped:
            sequence.stop()
        return text

    def piece(self, meter: Meter) -> Piece:
        """Return the same as a piece; the last one carries what `meter` measured."""
        sequence = self.sequence
        if len(sequence.tokens) == 1:
            meter.note_first_token()
        text = self.advance()
        reason = sequence.finish_reason
        statistics = None if reason is None else meter.statistics(len(sequence.tokens))
        return Piece(text, sequence.tokens[-1], reason, statistics, sequence.score)


def stream_text(
    opened: AbstractContextManager[Feeder], text: TextAssembly, speculate: int, meter: Meter
) -> Generator[Piece, None, None]:
    """Yield a piece for each new token; the last one carries the statistics.

    The feeder, of one sequence and with the costs of `meter`, is opened with the first piece.
    Closing the iterator frees it.
    """
    sequence = text.sequence
    with opened as feeder:
        feeder.cache.ensure(len(sequence.prompt))
        logits = feeder.prefill(0, sequence.prompt)
        for _ in generate_tokens(feeder, sequence, logits, speculate):
            yield text.piece(meter)


async def in_thread(
    pieces: Generator[Each, None, None], cancellation: Cancellation
) -> AsyncGenerator[Each, None]:
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
