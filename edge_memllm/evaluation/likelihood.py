"""How likely a model holds a continuation of a context: what every task is scored by.

The context is computed once for all its continuations: between them the cache is cut back to it.
Text is cut into tokens as lm-evaluation-harness does, so that scores are comparable. Knows no
tasks and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from edge_memllm.errors import RequestError
from edge_memllm.feeding import Feeder, Logits
from edge_memllm.manifest import ModelSpec
from edge_memllm.perplexity import next_token_losses
from edge_memllm.predictor import Predictor
from edge_memllm.request import check_tokens, start_token
from edge_memllm.tokenization import Tokenizer

_CHUNK = 64  # positions whose logits are alive at once


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely one continuation is."""

    logprob: float  # nats, of all its tokens
    greedy: bool  # whether each token is the likeliest one
    truncated: bool  # whether the context was too long and lost its beginning


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A context (at least one token) and what follows it (at least one)."""

    context: list[int]
    continuation: list[int]


class PairEncoder:
    """Cuts (context, continuation) into tokens; the rules are those of lm-evaluation-harness.

    White space at the end of a context goes to the continuation. Both are tokenized as one text,
    and the tokens beyond those of the context alone are the continuation. An empty context is the
    token that starts a text.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = spec.vocab_size
        self._start = start_token(spec)
        # Whether the tokenizer itself puts the start in front, as those of the Llama family do.
        self._adds_start = self._encode("")[:1] == [self._start]

    def pair(self, context: str, continuation: str) -> TokenPair:
        """Return the tokens; raises `RequestError` where nothing is left to predict."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if kept:
            known = self.text(kept)
            found = TokenPair(known, self.text(kept + continuation)[len(known) :])
        else:
            found = self._first(self._encode(continuation, special=False))
        if not found.continuation:
            raise RequestError(
                f"{continuation!a:.80} behind {context[-40:]!a} gives no token to predict. "
                "Give a continuation that is not empty."
            )
        return found

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the tokenizer puts in front, but not twice."""
        tokens = self._encode(text)
        twice = self._adds_start and tokens[1:2] == [self._start]
        return tokens[1:] if twice else tokens

    @property
    def start(self) -> int:
        """The token that starts a text; raises `RequestError` if the model has none."""
        if self._start is None:
            raise RequestError(
                "A text without context cannot be scored: the model has no token that starts a "
                "text. Give a context."
            )
        return self._start

    def _first(self, tokens: list[int]) -> TokenPair:
        """What is predicted from the start of a text, which may be written out already."""
        if tokens[:1] == [self.start]:
            return TokenPair(tokens[:1], tokens[1:])
        return TokenPair([self.start], tokens)

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return check_tokens(self._tokenizer.encode(text, special=special), self._vocabulary)


class Scorer:
    """Scores continuations with one model. Use it as a context manager: it owns a cache."""

    def __init__(self, model: Predictor) -> None:
        self.encoder = PairEncoder(model.tokenizer, model.manifest.model)
        self._most = model.manifest.model.max_position_embeddings
        self._feeder = Feeder(model.runtime, model.table, 1, max(_CHUNK, model.prefill_chunk))
        self._cut: int | None = None  # where the context in the cache begins
        self._logits: tuple[Sequence[int], Logits] | None = None  # of the last step, by what it fed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._feeder.__exit__(*error)

    def score_texts(self, context: str, continuations: Sequence[str]) -> list[Likelihood]:
        """Return the likelihood of each text behind one context; see `PairEncoder` and `score`."""
        pairs = [self.encoder.pair(context, each) for each in continuations]
        return self.score(pairs[0].context, [pair.continuation for pair in pairs])

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Likelihood]:
        """Return the likelihood of each continuation of one context, all of at least one token.

        A context that leaves no room for a continuation loses its beginning. Raises
        `RequestError` for a continuation that does not fit by itself.
        """
        self._cut = self._logits = None
        return [self._score(context, each) for each in continuations]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        if len(continuation) > self._most:
            raise RequestError(
                f"A continuation has {len(continuation)} tokens and the model's context holds "
                f"{self._most}. Leave the item out, or shorten it."
            )
        # The last token is predicted, not fed, so there is room for one more than the context.
        cut = max(0, len(context) + len(continuation) - self._most - 1)
        self._hold(context, cut)
        total, greedy, place = 0.0, True, 0
        for logits in self._steps([context[-1], *continuation[:-1]], len(context) - 1 - cut):
            targets = continuation[place : place + len(logits)]
            total -= float(next_token_losses(logits, targets).sum())
            greedy = greedy and bool((logits.argmax(axis=1) == np.asarray(targets)).all())
            place += len(targets)
        return Likelihood(total, greedy, cut > 0)

    def _hold(self, context: Sequence[int], cut: int) -> None:
        """Have all of context[cut:] but its last token in the cache."""
        if cut != self._cut:
            self._feeder.cache.truncate(0, 0)
            self._feeder.skip(0, context[cut:-1])
            self._cut, self._logits = cut, None

    def _steps(self, tokens: Sequence[int], held: int) -> Iterator[Logits]:
        """Yield the logits behind each token, a chunk at a time; the same tokens cost nothing."""
        if self._logits is not None and self._logits[0] == tokens:
            yield self._logits[1]
            return
        self._feeder.cache.truncate(0, held)
        for begin in range(0, len(tokens), _CHUNK):
            logits = self._feeder.score(0, tokens[begin : begin + _CHUNK])
            self._logits = (tokens, logits) if len(tokens) <= _CHUNK else None
            yield logits
