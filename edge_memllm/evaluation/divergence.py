"""How far a model's predictions are from those of a reference: KL divergence, token by token.

Both models are fed the same tokens in the same windows, once; the perplexity of both comes with
it. Knows logits and tokens, nothing of how either model was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.feeding import Logits
from edge_memllm.perplexity import (
    Perplexity,
    check_windows,
    combine,
    next_token_losses,
    predictions,
    text_tokens,
)
from edge_memllm.predictor import Predictor
from edge_memllm.request import start_token

_TOKENIZER = "tokenizer.json"
_BLOCK_VALUES = 1 << 20  # logits turned into float64 at a time

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model against its reference on a text; the reference's probabilities are the truth."""

    model: Perplexity
    reference: Perplexity
    kl: Values = field(repr=False)  # nats, of each predicted token, float64 [T]
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
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Compare a model with a reference on a text, in the windows of `measure_perplexity`.

    Keeps 8 bytes a token. Raises `RequestError` for models whose tokens do not mean the same, a
    text with nothing to predict, or windows that cannot be.
    """
    _check_same_tokens(model, reference)
    most = min(each.manifest.model.max_position_embeddings for each in (model, reference))
    context, stride = check_windows(context, stride, most)
    tokens = text_tokens(model, text)
    parts: list[Values] = []
    done = 0
    for part in _compare(model, reference, tokens.fed, context, stride):
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


def divergences(truth: Logits, found: Logits) -> Values:
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


def _divergences(truth: Logits, found: Logits) -> Values:
    logs, other = _log_softmax(truth), _log_softmax(found)
    result: Values = (np.exp(logs) * (logs - other)).sum(axis=1)
    return result


def _log_softmax(logits: Logits) -> Values:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _compare(
    model: Predictor, reference: Predictor, tokens: Sequence[int], context: int, stride: int
) -> Iterator[Values]:
    """Yield [4, T]: divergence, agreement, loss of the model and of the reference."""
    both = (
        predictions(each.runtime, each.table, tokens, context=context, stride=stride)
        for each in (model, reference)
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
    digests = {manifest.files[_TOKENIZER].sha256 for manifest in (ours, theirs)}
    if len(digests) > 1:
        raise RequestError(
            f"{_TOKENIZER} of the reference is not the model's, so their probabilities cannot be "
            "compared. Choose a reference with the same tokenizer."
        )
    starts = (start_token(ours.model), start_token(theirs.model))
    if starts[0] != starts[1]:
        raise RequestError(
            f"Texts start with token {starts[0]} in the model and {starts[1]} in the reference. "
            "Choose a reference that was exported with the same configuration."
        )
