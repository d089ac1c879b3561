"""The one perplexity of the project: how well a model predicts a text.

Long texts are read in overlapping windows, so every figure is stated with its context and
stride. Works over any runtime; knows nothing of devices or files.

With a reference, both models are fed the same tokens in the same windows, once, and the KL
divergence between them comes along. Text is tokenized in blocks, because a tokenizer holds much for
each letter; a block ends where cutting changes no token, which is tried at each cut.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypedDict

import numpy as np

from edge_memllm.arrays import Doubles, Logits
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.engine.feeding import Feeder
from edge_memllm.engine.request import start_token
from edge_memllm.errors import RequestError
from edge_memllm.progress import Counted
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import next_token_losses
from edge_memllm.table.source import RecordSource
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.long_text import long_text_tokens
from edge_memllm.text.tokenization import Tokenizer

_CHUNK = 64  # positions whose logits are alive at once
_LARGEST_EXPONENT = 700.0  # e to this is about the largest float

_BLOCK_VALUES = 1 << 17  # logits turned into float64 at a time: what stays in the cache


class Predictor(Protocol):
    """The part of `edge_memllm.Model` that predictions are made with; whoever opened it closes."""

    @property
    def manifest(self) -> Manifest:
        """What the model is."""

    @property
    def runtime(self) -> Runtime:
        """What computes."""

    @property
    def source(self) -> RecordSource:
        """Where records come from."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of text."""

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of one prefill step."""


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


class Windows(TypedDict):
    """How a text is cut, as keywords: windows of `context` tokens that advance by `stride`."""

    context: int | None
    stride: int | None


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
    memory_gain: Sequence[float] | None = None,
    progress: Counted | None = None,
) -> Perplexity:
    """Measure a model on a text, in windows of `context` tokens that advance by `stride`.

    None takes the model's whole context, and half the window as stride. The first token is
    predicted from the token that starts a text; a model without one does not predict it.
    `memory_gain` [L] replaces the model's gains.
    `progress(done, total)` is called with tokens. Raises `RequestError` for a text with nothing
    to predict, or windows that cannot be.
    """
    context, stride = check_windows(context, stride, model.manifest.model.max_position_embeddings)
    tokens = text_tokens(model, text)
    total, done = 0.0, 0
    for part in token_losses(
        model.runtime,
        model.source,
        tokens.fed,
        context=context,
        stride=stride,
        memory_gain=memory_gain,
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
    runtime: Runtime,
    table: RecordSource,
    tokens: Sequence[int],
    *,
    context: int,
    stride: int,
    memory_gain: Sequence[float] | None = None,
) -> Iterator[Doubles]:
    """Yield the losses in nats of tokens[1:], in order and a chunk at a time.

    Windows of `context` tokens begin every `stride` tokens (at most `context`); each predicts
    what the one before did not reach. `memory_gain` [L] replaces the model's gains.
    """
    for logits, targets in predictions(
        runtime, table, tokens, context=context, stride=stride, memory_gain=memory_gain
    ):
        yield next_token_losses(logits, targets)


def predictions(
    runtime: Runtime,
    table: RecordSource,
    tokens: Sequence[int],
    *,
    context: int,
    stride: int,
    memory_gain: Sequence[float] | None = None,
) -> Iterator[tuple[Logits, Sequence[int]]]:
    """Yield logits [T, V] and the tokens that came [T], in the windows of `token_losses`.

    The logits are valid until the next are asked for.
    """
    with Feeder(runtime, table, 1, _CHUNK, memory_gain=memory_gain) as feeder:
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


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model against its reference on a text; the reference's probabilities are the truth."""

    model: Perplexity
    reference: Perplexity
    kl: Doubles = field(repr=False)  # nats, of each predicted token, float64 [T]
    agreeing: int  # tokens for which both models hold the same token for the likeliest

    @property
    def top1_agreement(self) -> float:
        """Share of the tokens for which both models' likeliest token is the same."""
        return self.agreeing / len(self.kl)

    @property
    def perplexity_increase(self) -> float:
        """Relative change of perplexity; 0.01 is one per cent worse than the reference."""
        return self.model.perplexity / self.reference.perplexity - 1

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a dict for JSON; KL in nats."""
        return {
            "mean_kl": float(self.kl.mean()),
            "median_kl": float(np.median(self.kl)),
            "p99_kl": float(np.quantile(self.kl, 0.99)),
            "max_kl": float(self.kl.max()),
            "top1_agreement": self.top1_agreement,
            "perplexity_increase": self.perplexity_increase,
            "reference_perplexity": self.reference.perplexity,
            "tokens": len(self.kl),
        }


def measure_divergence(
    model: Predictor,
    reference: Predictor,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    memory_gain: Sequence[float] | None = None,
    progress: Counted | None = None,
) -> Divergence:
    """Compare a model with a reference on a text, in the windows of `measure_perplexity`.

    `memory_gain` [L] replaces the gains of the model, not of the reference. Keeps 8 bytes a token.
    Raises `RequestError` for models whose tokens do not mean the same, a text with nothing to
    predict, or windows that cannot be.
    """
    _check_same_tokens(model, reference)
    most = min(each.manifest.model.max_position_embeddings for each in (model, reference))
    context, stride = check_windows(context, stride, most)
    tokens = text_tokens(model, text)
    parts: list[Doubles] = []
    done = 0
    for part in _compare(model, reference, tokens.fed, context, stride, memory_gain):
        parts.append(part)
        done += part.shape[1]
        if progress is not None:
            progress(done, len(tokens.fed) - 1)
    kl, agreeing, loss, reference_loss = np.concatenate(parts, axis=1)
    counts = (done, tokens.bytes, tokens.words, context, stride)
    return Divergence(
        model=Perplexity(float(loss.sum()), *counts),
        reference=Perplexity(float(reference_loss.sum()), *counts),
        kl=kl.copy(),
        agreeing=int(agreeing.sum()),
    )


def combine_divergences(parts: Sequence[Divergence]) -> Divergence:
    """Return the figures of several texts together: every token counts once."""
    return Divergence(
        model=combine([part.model for part in parts]),
        reference=combine([part.reference for part in parts]),
        kl=np.concatenate([part.kl for part in parts]),
        agreeing=sum(part.agreeing for part in parts),
    )


def divergences(truth: Logits, found: Logits) -> Doubles:
    """Return KL(truth || found) in nats for each row of two arrays of logits [T, V].

    Computed in float64, a block of rows at a time; never below zero but by rounding, which is
    set to zero.
    """
    rows = max(1, _BLOCK_VALUES // truth.shape[1])
    parts = [
        _divergences(truth[begin : begin + rows], found[begin : begin + rows])
        for begin in range(0, len(truth), rows)
    ]
    return np.maximum(np.concatenate(parts), 0)


def _divergences(truth: Logits, found: Logits) -> Doubles:
    logs, other = _log_softmax(truth), _log_softmax(found)
    result: Doubles = (np.exp(logs) * (logs - other)).sum(axis=1)
    return result


def _log_softmax(logits: Logits) -> Doubles:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _compare(
    model: Predictor,
    reference: Predictor,
    tokens: Sequence[int],
    context: int,
    stride: int,
    memory_gain: Sequence[float] | None,
) -> Iterator[Doubles]:
    """Yield [4, T]: divergence, agreement, loss of the model and of the reference."""
    both = (
        predictions(
            each.runtime, each.source, tokens, context=context, stride=stride, memory_gain=gain
        )
        for each, gain in ((model, memory_gain), (reference, None))
    )
    for (found, targets), (truth, _) in zip(*both, strict=True):
        losses = (next_token_losses(logits, targets) for logits in (found, truth))
        agreeing = found.argmax(axis=1) == truth.argmax(axis=1)
        yield np.stack([divergences(truth, found), agreeing, *losses])


def _check_same_tokens(model: Predictor, reference: Predictor) -> None:
    ours, theirs = model.manifest, reference.manifest
    if ours.model.vocab_size != theirs.model.vocab_size:
        raise RequestError(
            f"The model has {ours.model.vocab_size} tokens and the reference "
            f"{theirs.model.vocab_size}: their probabilities cannot be compared. "
            "Choose a reference with the same tokenizer."
        )
    digests = {manifest.files[TOKENIZER_FILE].sha256 for manifest in (ours, theirs)}
    if len(digests) > 1:
        raise RequestError(
            f"{TOKENIZER_FILE} of the reference is not the model's, so their probabilities cannot "
            "be compared. Choose a reference with the same tokenizer."
        )
    starts = (start_token(ours.model), start_token(theirs.model))
    if starts[0] != starts[1]:
        raise RequestError(
            f"Texts start with token {starts[0]} in the model and {starts[1]} in the reference. "
            "Choose a reference that was exported with the same configuration."
        )
