"""The one perplexity of the project: how well a model predicts a text.

Long texts are read in overlapping windows, so every figure is stated with its context and
stride. Works over any runtime; knows nothing of devices or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.feeding import Feeder, Logits
from edge_memllm.model import Model
from edge_memllm.request import check_tokens, start_token
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import require_finite
from edge_memllm.table import Table

_CHUNK = 64  # positions whose logits are alive at once
_LARGEST_EXPONENT = 700.0  # e to this is about the largest float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a text was predicted; `nll` is the negative log-likelihood in nats.

    Each token was predicted from at least `context - stride` tokens before it, or from all.
    """

    perplexity: float
    nll_per_token: float
    nll_per_byte: float  # comparable between tokenizers
    bits_per_byte: float
    tokens: int  # predicted ones
    bytes: int  # of their text in UTF-8
    context: int
    stride: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


def measure_perplexity(
    model: Model,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure a model on a text, in windows of `context` tokens that advance by `stride`.

    None takes the model's whole context, and half the window as stride. The first token is
    predicted from the token that starts a text; a model without one does not predict it.
    `progress(done, total)` is called with tokens. Raises `RequestError` for a text with nothing
    to predict, or windows that cannot be.
    """
    spec = model.manifest.model
    context = spec.max_position_embeddings if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    _check_windows(context, stride, spec.max_position_embeddings)
    tokens = check_tokens(model.tokenizer.encode(text, special=False), spec.vocab_size)
    start = start_token(spec)
    predicted, predicted_text = tokens, text
    if start is None:
        predicted = tokens[1:]
        predicted_text = model.detokenize(predicted)
    if not predicted:
        raise RequestError(
            f"The text has {len(tokens)} tokens and none can be predicted. Give more text."
        )
    fed = tokens if start is None else [start, *tokens]
    losses: list[float] = []
    for part in token_losses(model.runtime, model.table, fed, context=context, stride=stride):
        losses.extend(part.tolist())
        if progress is not None:
            progress(len(losses), len(predicted))
    return _summarize(losses, len(predicted_text.encode()), context, stride)


def token_losses(
    runtime: Runtime, table: Table, tokens: Sequence[int], *, context: int, stride: int
) -> Iterator[NDArray[np.float64]]:
    """Yield the losses in nats of tokens[1:], in order and a chunk at a time.

    Windows of `context` tokens begin every `stride` tokens (at most `context`); each predicts
    what the one before did not reach.
    """
    with Feeder(runtime, table, 1, _CHUNK) as feeder:
        reached = 0  # tokens[reached] has been predicted, or is the first
        for begin in range(0, len(tokens) - 1, stride):
            end = min(begin + context, len(tokens) - 1)  # of what is fed, and of what is reached
            feeder.cache.truncate(0, 0)
            feeder.skip(0, tokens[begin:reached])
            for chunk in range(reached, end, _CHUNK):
                upto = min(chunk + _CHUNK, end)
                logits = feeder.score(0, tokens[chunk:upto])
                yield next_token_losses(logits, tokens[chunk + 1 : upto + 1])
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


def _check_windows(context: int, stride: int, most: int) -> None:
    if not 1 <= context <= most:
        raise RequestError(f"context is {context}, expected 1 to the model's {most}.")
    if not 1 <= stride <= context:
        raise RequestError(f"stride is {stride}, expected 1 to the context, {context}.")


def _summarize(losses: Sequence[float], size: int, context: int, stride: int) -> Perplexity:
    total = math.fsum(losses)
    per_token, per_byte = total / len(losses), total / max(1, size)
    return Perplexity(
        perplexity=math.exp(min(per_token, _LARGEST_EXPONENT)),
        nll_per_token=per_token,
        nll_per_byte=per_byte,
        bits_per_byte=per_byte / math.log(2),
        tokens=len(losses),
        bytes=size,
        context=context,
        stride=stride,
    )
