"""Choosing the next token from logits, in plain numpy.

The order of operations is that of Hugging Face: repetition penalty, temperature, top-k, top-p,
min-p, then one draw. Knows nothing of text, models or runtimes.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import EdgeMemLLMError, RequestError

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

SEED_LIMIT = 1 << 64
# A nucleus rarely holds more tokens than this; sorting them alone beats sorting the vocabulary.
_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen. The defaults switch everything off: temperature 0 is greedy.

    Raises `RequestError` for values outside the ranges given here.
    """

    temperature: float = 0.0  # >= 0; 0 takes the likeliest token
    top_k: int = 0  # >= 0; keep the k likeliest (and what ties with the last); 0 is off
    top_p: float = 1.0  # (0, 1]; keep the likeliest that together reach p; 1 is off
    min_p: float = 0.0  # [0, 1]; keep those with min_p times the best probability; 0 is off
    repetition_penalty: float = 1.0  # > 0; above 1 disfavours tokens already there; 1 is off

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, ">= 0", lambda x: x >= 0)
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_number("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k!r}, expected an integer >= 0 (0 is off).")

    @classmethod
    def from_generation_config(cls, config: dict[str, Any]) -> Sampling:
        """Return the defaults that a Hugging Face `generation_config.json` states.

        Without `do_sample: true` that is greedy, as there. A value left out is off.
        """
        sampled = config.get("do_sample") is True
        names = ("temperature", "top_k", "top_p", "min_p") if sampled else ()
        given = {n: config[n] for n in (*names, "repetition_penalty") if config.get(n) is not None}
        return cls(**({"temperature": 1.0} | given if sampled else given))


def _check_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= sys.float_info.max  # not NaN, not infinite, not a huge integer
        or not holds(value)
    ):
        raise RequestError(f"{name} is {value!r}, expected a number {expected}.")


def draw_seed() -> int:
    """Return a fresh seed, small enough to be typed again."""
    return secrets.randbits(32)


def check_seed(seed: object) -> int:
    """Return `seed` if it is an integer in [0, 2^64), else raise `RequestError`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise RequestError(f"seed is {seed!r}, expected an integer from 0 to 2^64 - 1.")
    return seed


class Sampler:
    """Chooses tokens for one sequence; the same seed, stream and logits give the same tokens.

    `stream` numbers the sequences of a batch, so that equal prompts get different samples.
    """

    def __init__(self, sampling: Sampling, seed: int, stream: int = 0) -> None:
        self.sampling = sampling
        sequence = np.random.SeedSequence(check_seed(seed), spawn_key=(stream,))
        self._random = np.random.Generator(np.random.PCG64(sequence))
        self._seen: set[int] = set()

    def observe(self, tokens: Iterable[int]) -> None:
        """Note tokens that stand in the text, for the repetition penalty."""
        if self.sampling.repetition_penalty != 1:
            self._seen.update(tokens)

    def pick(self, logits: Logits) -> int:
        """Return a token id for float32 logits [V], and note it as seen.

        Raises `EdgeMemLLMError` if any logit is NaN or infinite.
        """
        require_finite(logits)
        if self._seen:
            logits = penalize(logits, self._seen, self.sampling.repetition_penalty)
        greedy = self.sampling.temperature == 0
        token = int(logits.argmax()) if greedy else self._draw(logits)
        self.observe((token,))
        return token

    def _draw(self, logits: Logits) -> int:
        ids, probabilities = candidates(logits, self.sampling)
        cumulative = probabilities.cumsum()
        point = self._random.random() * cumulative[-1]
        # Without the last entry, so that a point rounded up to the total still has an owner.
        return int(ids[cumulative[:-1].searchsorted(point, side="right")])


def require_finite(logits: Logits) -> None:
    """Raise `EdgeMemLLMError` if any logit is NaN or infinite."""
    finite = np.isfinite(logits)
    if not finite.all():
        raise EdgeMemLLMError(
            f"{np.count_nonzero(~finite)} of {logits.size} logits are NaN or infinite: the graph "
            "overflowed or its weights are damaged. Run 'edge-memllm verify' on the artifact; if "
            "it is whole, export it again."
        )


def penalize(logits: Logits, seen: Iterable[int], penalty: float) -> Logits:
    """Return a copy of logits [V] in which the seen tokens are less likely (penalty > 1)."""
    penalized = logits.copy()
    ids = np.fromiter(seen, np.intp)
    values = penalized[ids]
    penalized[ids] = np.where(values < 0, values * penalty, values / penalty)
    return penalized


def candidates(logits: Logits, sampling: Sampling) -> tuple[Ids, NDArray[np.float64]]:
    """Return the ids that may be drawn and their probabilities, summing to about 1.

    Applies temperature (which must be above 0), top-k, top-p and min-p to logits [V].
    """
    ids = _top_k(logits, sampling.top_k)
    scaled = logits[ids].astype(np.float64)
    # Subtracting first keeps a tiny temperature from overflowing.
    weights = np.exp((scaled - scaled.max()) / sampling.temperature)
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0:
        kept = weights >= sampling.min_p * weights.max()
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _top_k(logits: Logits, k: int) -> Ids:
    if not 0 < k < logits.size:
        return np.arange(logits.size)
    last = np.partition(logits, -k)[-k]
    return np.flatnonzero(logits >= last)


def _nucleus(weights: NDArray[np.float64], top_p: float) -> Ids:
    """Return the fewest entries, likeliest first, whose share of the total reaches top_p."""
    target = top_p * weights.sum()
    order = _likeliest(weights, _NUCLEUS_GUESS)
    reached = weights[order].cumsum()
    if reached[-1] < target:
        order = _likeliest(weights, weights.size)
        reached = weights[order].cumsum()
    return order[: int(reached.searchsorted(target)) + 1]


def _likeliest(weights: NDArray[np.float64], count: int) -> Ids:
    """Return the ids of the `count` largest weights, largest first."""
    if count < weights.size:
        ids = np.argpartition(weights, -count)[-count:]
    else:
        ids = np.arange(weights.size)
    return ids[np.argsort(-weights[ids], kind="stable")]
