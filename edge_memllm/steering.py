"""Wishes about single tokens: made likelier or less likely, used already, allowed or not.

Applied to logits before a token is chosen from them, beside the rules of `sampling`. Knows token
ids only: no text, no grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_memllm.checked_values import check_number
from edge_memllm.errors import EdgeMemLLMError

MOST_PENALTY = 2.0
MOST_BIAS = 100.0
_NO_BIAS: Mapping[int, float] = MappingProxyType({})


class Constraint(Protocol):
    """What may come next in one text, for example by a grammar. Belongs to one text only."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return which tokens [V] may come next, None for all; the end of the text is one too."""

    def advance(self, token: int) -> None:
        """Take the token that was chosen, which was an allowed one."""


@dataclass(frozen=True, slots=True)
class Steering:
    """Wishes about tokens, as servers of language models take them. The defaults are off.

    Both penalties look at the tokens chosen so far, not at the prompt: `frequency_penalty` is
    subtracted from a token's logit for each time, `presence_penalty` once. `logit_bias` is added
    to the logits of tokens: -100 all but forbids one, 100 all but forces it.

    Raises `RequestError` for values out of range.
    """

    frequency_penalty: float = 0.0  # -2 to 2
    presence_penalty: float = 0.0  # -2 to 2
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)  # -100 to 100 each

    def __post_init__(self) -> None:
        for name in ("frequency_penalty", "presence_penalty"):
            check_number(name, getattr(self, name), -MOST_PENALTY, MOST_PENALTY)
        for token, bias in self.logit_bias.items():
            check_number(f"logit_bias of token {token!r:.40}", bias, -MOST_BIAS, MOST_BIAS)

    @property
    def active(self) -> bool:
        """Whether anything is wished for."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)

    def applied(
        self, logits: NDArray[np.float32], counts: Mapping[int, int]
    ) -> NDArray[np.float32]:
        """Return a copy of logits [V] with the wishes; `counts` says how often tokens came."""
        steered = logits.copy()
        if counts and (self.frequency_penalty or self.presence_penalty):
            ids, times = _arrays(counts)
            steered[ids] -= self.frequency_penalty * times + self.presence_penalty
        if self.logit_bias:
            ids, biases = _arrays(self.logit_bias)
            steered[ids] += biases
        return steered


def allowed_ids(constraint: Constraint, vocab_size: int) -> NDArray[np.intp] | None:
    """Return the ids a constraint allows next, None for all.

    Raises `EdgeMemLLMError` if it allows none, or speaks of another vocabulary.
    """
    mask = constraint.allowed()
    if mask is None:
        return None
    if mask.shape != (vocab_size,):
        raise EdgeMemLLMError(
            f"The constraint speaks of {mask.shape} tokens, the model has {vocab_size}. Make it "
            "from the model's own tokenizer."
        )
    ids = np.flatnonzero(mask)
    if not ids.size:
        raise EdgeMemLLMError(
            "The constraint allows no token, not even the end of the text. Loosen it."
        )
    return ids


def _arrays(values: Mapping[int, float]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    count = len(values)
    return (
        np.fromiter(values.keys(), np.intp, count),
        np.fromiter(values.values(), np.float32, count),
    )
