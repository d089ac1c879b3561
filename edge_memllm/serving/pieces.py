"""What an engine gives out: pieces of text with the likelihood of tokens, and what they took.

Plain data; the only computing is that of log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_memllm.generation import FinishReason
from edge_memllm.perplexity import next_token_losses

# Where a token's record came from: read from the table; found in the record cache; there already,
# for another place of the same step; or not needed, for the token's keys and values were kept.
Origin = Literal["storage", "cache", "shared", "kept"]


@dataclass(frozen=True, slots=True)
class RecordUse:
    """A token that was fed to the model, and its record: embedding and memory of all layers."""

    position: int  # in the text, from 0 with the first token of the prompt
    token: int
    bytes: int  # that the record has, wherever it came from
    origin: Origin


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely the model held a token, and which it held likeliest.

    In nats, by the model's own distribution: before temperature, penalties, biases, constraints.
    """

    token: int
    logprob: float | None  # None for the first token of a prompt, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()  # likeliest first


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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ReplyPiece:
    """What one new token added to one choice; `text` may be empty while it is held back.

    The last piece of a choice has a `finish_reason` and statistics, as in `streaming.Piece`. A
    request for no tokens at all ends with a piece whose `token` is None. `records`, where they
    were wished for, are of the tokens fed for it: of the prompt, then of the token before each.
    """

    choice: int
    text: str
    token: int | None
    score: TokenScore | None = None
    finish_reason: FinishReason | None = None
    statistics: ChoiceStatistics | None = None
    records: tuple[RecordUse, ...] = ()


def token_scores(logits: NDArray[Any], tokens: Sequence[int], top: int) -> Iterator[TokenScore]:
    """Yield the score of each token [T] under logits [T, V], with the `top` likeliest tokens."""
    wide = np.asarray(logits, np.float32)
    losses = next_token_losses(wide, tokens)
    for row, token, loss in zip(wide, tokens, losses.tolist(), strict=True):
        yield TokenScore(token, -loss, _likeliest(row, float(row[token]) + loss, top))


def _likeliest(
    logits: NDArray[np.float32], normalizer: float, count: int
) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    count = min(count, logits.size)
    ids = np.argpartition(logits, -count)[-count:]
    ordered = ids[np.lexsort((ids, -logits[ids]))].tolist()
    return tuple((token, float(logits[token]) - normalizer) for token in ordered)
