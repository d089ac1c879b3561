"""A text under way in an engine, and the reply its pieces go to.

Pieces go in from the engine's thread and come out in any other, or in asyncio, not in both. A text
knows its tokens, its scores and where its records came from; nothing of places or of models.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Condition
from time import monotonic
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.layout import TableLayout
from edge_memllm.engine.generation import (
    FinishReason,
    PromptLookup,
    TextAssembly,
    TokenSequence,
)
from edge_memllm.engine.request import CheckedRequest
from edge_memllm.engine.scores import TokenScore, token_scores
from edge_memllm.engine.slots import Beginning
from edge_memllm.errors import DeadlineError, ServiceError
from edge_memllm.overlays.loaded import Selection
from edge_memllm.runtime_protocol import StepLogits
from edge_memllm.table.source import Fetched
from edge_memllm.text.tokenization import Tokenizer

# Where a token's record came from: read from the table; found in the record cache; there already,
# for another place of the same step; or not needed, for the token's keys and values were kept.
Origin = Literal["storage", "cache", "shared", "kept"]


@dataclass(frozen=True, slots=True)
class ReplyPiece:
    """What one new token added to one choice; `text` may be empty while it is held back.

    The last piece of a choice has a `finish_reason` and statistics, as in `Piece`. A
    request for no tokens at all ends with a piece whose `token` is None. `records`, where they
    were wished for, are of the tokens fed for it: of the prompt, then of the token before each.
    `stopped_by` is the stop string that ended the text, if one did. A piece with `progress` tells
    of the prompt, where that was wished for, and has nothing else.
    """

    choice: int
    text: str
    token: int | None
    score: TokenScore | None = None
    finish_reason: FinishReason | None = None
    statistics: ChoiceStatistics | None = None
    records: tuple[RecordUse, ...] = ()
    stopped_by: str | None = None
    progress: PromptProgress | None = None


@dataclass(frozen=True, slots=True)
class RecordUse:
    """A token that was fed to the model, and its record: embedding and memory of all layers."""

    position: int  # in the text, from 0 with the first token of the prompt
    token: int
    bytes: int  # that the record has, wherever it came from
    origin: Origin


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """How much of a prompt is computed."""

    tokens: int
    reused: int  # that were there already
    computed: int  # those reused among them
    seconds: float  # since its first chunk


@dataclass(frozen=True, slots=True)
class ChoiceStatistics:
    """What one choice of a reply took. Seconds count from when the request was submitted."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, whose keys and values were there already
    completion_tokens: int  # an end-of-text token among them
    queued_seconds: float
    first_token_seconds: float | None  # None when no token was asked for
    seconds: float
    seed: int
    overlays: tuple[str, ...]  # those that were on
    draft_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # of those, what was chosen
    shared_steps: int = 0  # that had room for no drafts, for other texts were in them

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


class Reply:
    """The pieces of all choices of one request, in the order they came about.

    Iterating waits for them; it ends after the last piece, or raises what went wrong. Leaving
    early must `cancel`: use it as a context manager, which does. One reader at a time. A deadline
    is kept by whoever reads: it holds also while the engine waits for a disk, or for ever.
    """

    def __init__(
        self,
        prompt: list[int],
        seed: int,
        choices: int,
        on_cancel: Callable[[], None],
        deadline: Deadline | None = None,
    ) -> None:
        """Take what was asked, and what tells the engine that nobody wants the rest."""
        self.prompt = prompt
        self.seed = seed
        # There with the first piece of the first choice, where they were asked for.
        self.prompt_scores: tuple[TokenScore, ...] | None = None
        self._open = choices
        self._on_cancel = on_cancel
        self._deadline = deadline
        self._came = 0  # tokens
        self._changed = Condition()
        self._pieces: deque[ReplyPiece] = deque()
        self._ended = False
        self._cancelled = False
        self._error: Exception | None = None
        self._waiting: Callable[[], object] | None = None  # what wakes a reader in asyncio

    @property
    def ended(self) -> bool:
        """Whether no more pieces come: all were put in, it was cancelled, or something failed."""
        return self._ended

    def cancel(self) -> None:
        """Give up the rest: the engine stops within one token. Twice, or after the end, is fine."""
        with self._changed:
            if self._ended:
                return
            self._ended = self._cancelled = True
            self._wake()
        self._on_cancel()

    def put(self, piece: ReplyPiece) -> None:
        """Add a piece, from the engine; dropped when the reply has ended."""
        with self._changed:
            if not self._ended:
                self._pieces.append(piece)
                self._came += piece.token is not None
                self._open -= piece.finish_reason is not None
                self._ended = not self._open
                self._wake()

    def fail(self, error: BaseException) -> None:
        """End the reply with what went wrong; the pieces so far can still be read."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, as_exception(error)
                self._wake()

    def over(self) -> bool:
        """Whether no more pieces come; ends it when its time is over."""
        if not self._ended and self._deadline is not None and self._deadline.left <= 0:
            self.fail(self._deadline.error(self._came))
        return self._ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[ReplyPiece]:
        while True:
            with self._changed:
                ready = self._changed.wait_for(self._ready, self._patience())
                piece = self._next() if ready else None
            if not ready:
                self._expire()
            elif piece is None:
                return
            else:
                yield piece

    async def __aiter__(self) -> AsyncIterator[ReplyPiece]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._waiting = lambda: loop.call_soon_threadsafe(more.set)
        while True:
            with self._changed:
                more.clear()
                ready = self._ready()
                piece = self._next() if ready else None
            if not ready:
                try:
                    async with asyncio.timeout(self._patience()):
                        await more.wait()
                except TimeoutError:
                    self._expire()
            elif piece is None:
                return
            else:
                yield piece

    def _ready(self) -> bool:
        return bool(self._pieces) or self._ended

    def _patience(self) -> float | None:
        """Return for how many seconds to wait for more."""
        return None if self._deadline is None else max(0.0, self._deadline.left)

    def _expire(self) -> None:
        """End the reply if its time is over, and tell the engine that nobody wants the rest."""
        if self.over():
            self._on_cancel()

    def _next(self) -> ReplyPiece | None:
        """Return the next piece, or None at the end; raises what went wrong."""
        if self._cancelled:
            return None
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiting is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._waiting()


class Deadline(NamedTuple):
    """When a reply has to be complete. Seconds, as `time.monotonic` counts them."""

    seconds: float  # that were given
    since: float
    tokens: int  # that all choices together may get

    @property
    def left(self) -> float:
        """Seconds until then, negative when it is over."""
        return self.since + self.seconds - monotonic()

    def error(self, came: int) -> DeadlineError:
        """Return what a reader is told when it is over."""
        return DeadlineError(
            f"The request was given {self.seconds:g} seconds, and {came} of {self.tokens} tokens "
            "had come. Ask for less, give it more time, or try again when less is asked."
        )


def as_exception(error: BaseException) -> Exception:
    """Return what a reader can be told of anything that was raised.

    A panic of a library in Rust is no `Exception`, and would end whatever thread reads it.
    """
    if isinstance(error, Exception):
        return error
    found = ServiceError(f"A library failed on this request ({type(error).__name__}: {error}).")
    found.__cause__ = error
    return found


class PieceSink(Protocol):
    """Whoever gets the pieces of a text: a `Reply`, or `CollectedText`."""

    prompt_scores: tuple[TokenScore, ...] | None

    def put(self, piece: ReplyPiece) -> None:
        """Take a piece."""

    def fail(self, error: BaseException) -> None:
        """Take what ended a text before its end."""

    def over(self) -> bool:
        """Whether nobody wants any more."""


class CollectedText:
    """Takes the pieces of one text for whoever computes it; what goes wrong is raised at once."""

    def __init__(self) -> None:
        self.text = ""
        self.prompt_scores: tuple[TokenScore, ...] | None = None

    def put(self, piece: ReplyPiece) -> None:
        """Append its text."""
        self.text += piece.text

    def fail(self, error: BaseException) -> None:
        """Raise it."""
        raise error

    def over(self) -> bool:
        """Say no: whoever computes it wants all of it."""
        return False


class Generation:
    """A text under way. The first of a request also scores its prompt, where that is asked for."""

    def __init__(
        self,
        number: int,
        request: CheckedRequest,
        records: Selection,
        reply: PieceSink,
        tokenizer: Tokenizer,
    ) -> None:
        asked = request.request
        self.sequence = TokenSequence.of(request, number)
        self.beginning = Beginning(request.prompt, records)
        self.scores_prompt = asked.score_prompt and number == 0
        # Computes the whole of its prompt, whatever of it is there.
        self.fresh = self.scores_prompt or not (asked.cache_prompt or number)
        self._progress = asked.progress and number == 0
        self.reused = 0  # tokens of the prompt that need no computing
        self._number = number
        self._overlays = records.names
        self._request = request
        self._top = asked.top
        self._reply = reply
        self._text = TextAssembly(tokenizer, self.sequence, request.stops, asked.shown_tokens)
        self._lookup = PromptLookup(asked.speculate) if asked.speculate else None
        self._drafts = deque[int]()  # that may still be right, of the step under way
        self._drafted = self._accepted = self._shared_steps = 0
        self._prompt_scores: list[TokenScore] = []
        self._trace = Trace(request.prompt, records.source.layout) if asked.trace else None
        self._submitted = monotonic()
        self._begun: float | None = None
        self._filled: float | None = None  # since when its prompt is computed, where that is told
        self._first: float | None = None

    @property
    def prompt(self) -> list[int]:
        """The tokens to begin with, at least one."""
        return self._request.prompt

    @property
    def finished(self) -> bool:
        """Whether it gets no more tokens."""
        return self.sequence.finish_reason is not None

    @property
    def served_seconds(self) -> float:
        """How long it has had a place."""
        return 0.0 if self._begun is None else monotonic() - self._begun

    def over(self) -> bool:
        """Whether nobody wants it any more; ends its reply when the time is over."""
        return self._reply.over()

    def begin(self) -> None:
        """Note that it has a place now."""
        self._begun = monotonic()

    def note_progress(self, computed: int) -> None:
        """Tell how many tokens of the prompt are computed, if that is wished for."""
        if self._progress:
            self._filled = self._filled or monotonic()
            seconds = monotonic() - self._filled if computed > self.reused else 0.0
            told = PromptProgress(len(self.prompt), self.reused, computed, seconds)
            self._reply.put(ReplyPiece(self._number, "", None, progress=told))

    def note_fed(
        self, start: int, tokens: Sequence[int], fetched: Fetched, before: Sequence[int] = ()
    ) -> None:
        """Note that `tokens` were fed at `start`, in a step in which others fed those `before`."""
        if self._trace is not None:
            self._trace.note(start, tokens, fetched, before)

    def note_prompt(self, logits: NDArray[np.float32], place: int) -> None:
        """Score the prompt's tokens behind `place` with logits [T, V] of the positions from it."""
        coming = self.prompt[place + 1 : place + 1 + len(logits)]
        if not self._prompt_scores:
            self._prompt_scores.append(TokenScore(self.prompt[0], None))
        if coming:
            self._prompt_scores += token_scores(logits[: len(coming)], coming, self._top or 0)

    def drafts(self, room: int) -> list[int]:
        """Return at most `room` tokens that may come next, where that was asked for."""
        if self._lookup is None:
            return []
        self._lookup.follow(self.sequence)
        drafts = self._lookup.propose(min(self.sequence.left - 1, room))
        self._drafted += len(drafts)
        self._drafts = deque(drafts)
        return drafts

    def learn(self, proposed: int, accepted: int) -> None:
        """Take how many drafts of a step were right."""
        if self._lookup is not None:
            self._lookup.learn(proposed, accepted)

    def note_shared_step(self) -> None:
        """Note a step with other texts, which has no room for drafts."""
        self._shared_steps += self._lookup is not None

    def take(self, logits: StepLogits) -> None:
        """Choose the next token from logits [V] and hand out the piece it makes."""
        if not self.sequence.tokens:
            self._begin_text()
        if self.finished:
            return
        token = self.sequence.extend(logits)
        if self._drafts and token == self._drafts.popleft():
            self._accepted += 1
        else:
            self._drafts.clear()
        self._hand_out(self._text.advance(), token, self.sequence.score)

    def fail(self, error: BaseException) -> None:
        """End the reply with an error."""
        self._reply.fail(error)

    def _begin_text(self) -> None:
        self.sequence.sampler.observe(self.prompt)
        if self.scores_prompt:
            self._reply.prompt_scores = tuple(self._prompt_scores)
        if self._request.limit:
            self._first = monotonic()
        else:
            self.sequence.finish_reason = "length"
            self._hand_out("", None, None)

    def _hand_out(self, text: str, token: int | None, score: TokenScore | None) -> None:
        reason: FinishReason | None = self.sequence.finish_reason
        statistics = None if reason is None else self._statistics()
        records = () if self._trace is None else self._trace.take()
        stopped_by = None if reason is None or token is None else self._text.stopped_by
        self._reply.put(
            ReplyPiece(self._number, text, token, score, reason, statistics, records, stopped_by)
        )

    def _statistics(self) -> ChoiceStatistics:
        now, start = monotonic(), self._submitted
        return ChoiceStatistics(
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            completion_tokens=len(self.sequence.tokens),
            queued_seconds=(self._begun or now) - start,
            first_token_seconds=None if self._first is None else self._first - start,
            seconds=now - start,
            seed=self._request.seed,
            overlays=self._overlays,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
            shared_steps=self._shared_steps,
        )


class Trace:
    """The records of one text, from its first token on, in the order of its positions."""

    def __init__(self, prompt: Sequence[int], layout: TableLayout) -> None:
        self._prompt = prompt
        self._layout = layout
        self._fresh: list[RecordUse] = []
        self._length = 0

    def note(
        self, start: int, tokens: Sequence[int], fetched: Fetched, before: Collection[int]
    ) -> None:
        """Note a step that fed `tokens` at `start`, behind what needed no computing.

        `before` are the tokens that other texts fed in the same step, as far as they come first.
        """
        for position in range(self._length, start):
            self._add(position, self._prompt[position], "kept")
        seen = set(before)
        for position, token in enumerate(tokens, start):
            if token in seen:
                self._add(position, token, "shared")
            else:
                self._add(position, token, "storage" if token in fetched.stored else "cache")
            seen.add(token)
        self._length = start + len(tokens)

    def take(self) -> tuple[RecordUse, ...]:
        """Return what was noted since this was called last."""
        found, self._fresh = tuple(self._fresh), []
        return found

    def _add(self, position: int, token: int, origin: Origin) -> None:
        size = self._layout.size_of(token)
        self._fresh.append(RecordUse(position, token, size, origin))
