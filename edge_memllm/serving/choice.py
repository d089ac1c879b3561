"""One choice of a request: its tokens and its text as they come about, handed to the reply.

The rules of a text (what ends it, stop strings, sampling) are those of `generation` and
`streaming`. Knows nothing of caches or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.generation import FinishReason, TokenSequence
from edge_memllm.overlays.shelf import Selection
from edge_memllm.runtime_protocol import StepLogits
from edge_memllm.sampling import Sampler
from edge_memllm.serving.channel import Reply
from edge_memllm.serving.pieces import ChoiceStatistics, ReplyPiece, TokenScore, token_scores
from edge_memllm.serving.request import CheckedRequest
from edge_memllm.serving.slots import Beginning
from edge_memllm.serving.trace import Trace
from edge_memllm.streaming import TextAssembly
from edge_memllm.table import Fetched
from edge_memllm.tokenization import Tokenizer


class Choice:
    """A text under way. The first of a request also scores its prompt, where that is wished."""

    def __init__(
        self,
        number: int,
        request: CheckedRequest,
        records: Selection,
        reply: Reply,
        tokenizer: Tokenizer,
    ) -> None:
        wish = request.wish
        constraint = None if wish.constraint is None else wish.constraint()
        sampler = Sampler(
            request.sampling,
            request.seed,
            number,
            steering=wish.steering,
            constraint=constraint,
        )
        self.sequence = TokenSequence(request.prompt, sampler, request.limit, request.ends)
        self.beginning = Beginning(request.prompt, records.source)
        self.scores_prompt = wish.score_prompt and number == 0
        self.reused = 0  # tokens of the prompt that need no computing
        self._number = number
        self._overlays = records.names
        self._request = request
        self._reply = reply
        self._text = TextAssembly(tokenizer, self.sequence, request.stops)
        self._prompt_scores: list[TokenScore] = []
        self._trace = Trace(request.prompt, records.source) if wish.trace else None
        self._submitted = monotonic()
        self._begun: float | None = None
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
            self._prompt_scores += token_scores(logits[: len(coming)], coming, self._request.top)

    def take(self, logits: StepLogits) -> None:
        """Choose the next token from logits [V] and hand out the piece it makes."""
        if not self.sequence.tokens:
            self._begin_text()
        if self.finished:
            return
        self.sequence.extend(logits)
        piece = self._text.advance()
        self._hand_out(piece.text, piece.token, self._score(logits, piece.token))

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

    def _score(self, logits: NDArray[Any], token: int) -> TokenScore | None:
        if not self._request.scored:
            return None
        return next(token_scores(logits[None], [token], self._request.top))

    def _hand_out(self, text: str, token: int | None, score: TokenScore | None) -> None:
        reason: FinishReason | None = self.sequence.finish_reason
        statistics = None if reason is None else self._statistics()
        records = () if self._trace is None else self._trace.take()
        self._reply.put(ReplyPiece(self._number, text, token, score, reason, statistics, records))

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
        )
