"""The one perplexity of the project: how well a model predicts a text.

Long texts are read in overlapping windows, so every figure is stated with its context and
stride. Works over any runtime; knows nothing of devices or files.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.feeding import Feeder, Logits
from edge_memllm.long_text import long_text_tokens
from edge_memllm.predictor import Predictor
from edge_memllm.record_source import RecordSource
from edge_memllm.request import start_token
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import require_finite

Progress = Callable[[int, int], None]

_CHUNK = 64  # positions whose logits are alive at once
_LARGEST_EXPONENT = 700.0  # e to this is about the largest float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a text was predicted; `nll` is the negative log-likelihood in nats.

    Each token was predicted from at least `context - stride` tokens before it, or from all.
    Figures per byte and per word are comparable between tokenizers, those per token are not.
    """

    nll: float  # of the whole text
    tokens: int  # predicted ones
    bytes: int  # of their text in UTF-8
    words: int  # of their text, as whitespace separates them
    context: int
    stride: int

    @property
    def nll_per_token(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """How many tokens the model hesitates between, as a geometric mean."""
        return exponential(self.nll_per_token)

    @property
    def nll_per_byte(self) -> float:
        """Nats per byte of UTF-8."""
        return self.nll / max(1, self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """The same in bits."""
        return self.nll_per_byte / math.log(2)

    @property
    def byte_perplexity(self) -> float:
        """Perplexity if bytes were the tokens."""
        return exponential(self.nll_per_byte)

    @property
    def word_perplexity(self) -> float:
        """Perplexity if words were the tokens."""
        return exponential(self.nll / max(1, self.words))

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as a dict for JSON."""
        return {
            "perplexity": self.perplexity,
            "nll_per_token": self.nll_per_token,
            "nll_per_byte": self.nll_per_byte,
            "bits_per_byte": self.bits_per_byte,
            "byte_perplexity": self.byte_perplexity,
            "word_perplexity": self.word_perplexity,
            **asdict(self),
        }


@dataclass(frozen=True, slots=True)
class TextTokens:
    """A text as a model is fed it: `fed[1:]` are the tokens to predict, each from those before."""

    fed: Sequence[int]
    bytes: int  # of the text of the tokens to predict
    words: int


def measure_perplexity(
    model: Predictor,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure a model on a text, in windows of `context` tokens that advance by `stride`.

    None takes the model's whole context, and half the window as stride. The first token is
    predicted from the token that starts a text; a model without one does not predict it.
    `progress(done, total)` is called with tokens. Raises `RequestError` for a text with nothing
    to predict, or windows that cannot be.
    """
    context, stride = check_windows(context, stride, model.manifest.model.max_position_embeddings)
    tokens = text_tokens(model, text)
    total, done = 0.0, 0
    for part in token_losses(
        model.runtime, model.table, tokens.fed, context=context, stride=stride
    ):
        total += math.fsum(part.tolist())
        done += len(part)
        if progress is not None:
            progress(done, len(tokens.fed) - 1)
    return Perplexity(total, done, tokens.bytes, tokens.words, context, stride)


def combine(parts: Sequence[Perplexity]) -> Perplexity:
    """Return the figures of several texts together: every token counts once."""
    first = parts[0]
    return Perplexity(
        nll=math.fsum(part.nll for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        words=sum(part.words for part in parts),
        context=first.context,
        stride=first.stride,
    )


def text_tokens(model: Predictor, text: str) -> TextTokens:
    """Return a text as tokens behind the one that starts a text, if the model has one.

    Raises `RequestError` for a text with nothing to predict.
    """
    spec = model.manifest.model
    tokens = long_text_tokens(model.tokenizer, text, spec.vocab_size)
    start = start_token(spec)
    fed = tokens if start is None else array("i", [start]) + tokens
    if len(fed) < 2:
        raise RequestError(
            f"The text has {len(tokens)} tokens and none can be predicted. Give more text."
        )
    predicted = text if start is not None else model.tokenizer.decode(list(tokens[1:]))
    return TextTokens(fed, len(predicted.encode()), len(predicted.split()))


def token_losses(
    runtime: Runtime, table: RecordSource, tokens: Sequence[int], *, context: int, stride: int
) -> Iterator[NDArray[np.float64]]:
    """Yield the losses in nats of tokens[1:], in order and a chunk at a time.

    Windows of `context` tokens begin every `stride` tokens (at most `context`); each predicts
    what the one before did not reach.
    """
    for logits, targets in predictions(runtime, table, tokens, context=context, stride=stride):
        yield next_token_losses(logits, targets)


def predictions(
    runtime: Runtime, table: RecordSource, tokens: Sequence[int], *, context: int, stride: int
) -> Iterator[tuple[Logits, Sequence[int]]]:
    """Yield logits [T, V] and the tokens that came [T], in the windows of `token_losses`.

    The logits are valid until the next are asked for.
    """
    with Feeder(runtime, table, 1, _CHUNK) as feeder:
        reached = 0  # tokens[reached] has been predicted, or is the first
        for begin in range(0, len(tokens) - 1, stride):
            end = min(begin + context, len(tokens) - 1)  # of what is fed, and of what is reached
            feeder.cache.truncate(0, 0)
            feeder.skip(0, tokens[begin:reached])
            for chunk in range(reached, end, _CHUNK):
                upto = min(chunk + _CHUNK, end)
                yield feeder.score(0, tokens[chunk:upto]), tokens[chunk + 1 : upto + 1]
            reached = end
            if reached == len(tokens) - 1:
                return


def next_token_losses(logits: Logits, targets: Sequence[int]) -> NDArray[np.float64]:
    """Return the loss in nats of each target [T] under the logits [T, V] of its position."""
    require_finite(logits)
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(targets)), targets].astype(np.float64)
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64)) - chosen
    return losses


def check_windows(context: int | None, stride: int | None, most: int) -> tuple[int, int]:
    """Return context and stride, None replaced: all of `most`, and half of the context.

    Raises `RequestError` for windows that cannot be.
    """
    context = most if context is None else context
    if not 1 <= context <= most:
        raise RequestError(f"context is {context}, expected 1 to the model's {most}.")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise RequestError(f"stride is {stride}, expected 1 to the context, {context}.")
    return context, stride


def exponential(nats: float) -> float:
    """Return e to the power of `nats`, or the largest figure JSON can hold."""
    return math.exp(min(nats, _LARGEST_EXPONENT))
