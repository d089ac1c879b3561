"""Choosing the next token from logits, in plain numpy.

The order of operations is that of Hugging Face: repetition penalty, then the other `Penalties`,
temperature, top-k, top-p, min-p, then one draw. Knows nothing of text, models or runtimes.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Logits
from edge_memllm.checked_values import check_number, is_integer, is_number, wrong_value
from edge_memllm.errors import EdgeMemLLMError

MOST_PENALTY = 2.0
MOST_BIAS = 100.0
FORBIDDEN = -math.inf  # as a bias
_NO_BIAS: Mapping[int, float] = MappingProxyType({})

_INFINITE = 0x7C00  # the bits of +inf; NaN lies above, in both signs
_SIGN = 0x8000
_KEPT = np.int32(-0x70002000)  # of the shifted bits: sign, exponent and fraction
_EXPONENTS_APART = np.float32(2.0**112)

Indices = NDArray[np.intp]

SEED_LIMIT = 1 << 64
# A nucleus rarely holds more tokens than this; sorting them alone beats sorting the vocabulary.
_NUCLEUS_GUESS = 1024
# A draw adds up blocks first and then one block's entries: the running sum of all is slow.
_BLOCK = 512


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
        if not is_integer(self.top_k) or self.top_k < 0:
            raise wrong_value("top_k", self.top_k, "an integer >= 0 (0 is off)")

    @classmethod
    def from_generation_config(cls, config: dict[str, Any]) -> Sampling:
        """Return the defaults that a Hugging Face `generation_config.json` states.

        Without `do_sample: true` that is greedy, as there. A value left out is transformers' own:
        off, but 50 for `top_k`, which it does not write. Raises `RequestError` for values that
        are none.
        """
        sampled = config.get("do_sample")
        if sampled is not None and not isinstance(sampled, bool):
            raise wrong_value("do_sample", sampled, "true or false")
        names = ("temperature", "top_k", "top_p", "min_p") if sampled else ()
        given = {n: config[n] for n in (*names, "repetition_penalty") if config.get(n) is not None}
        return cls(**({"temperature": 1.0, "top_k": 50} | given if sampled else given))


def _check_number(name: str, value: object, expected: str, holds: Callable[[float], bool]) -> None:
    if not is_number(value) or not holds(value):
        raise wrong_value(name, value, f"a number {expected}")


@dataclass(frozen=True, slots=True)
class Penalties:
    """Changes to logits, as servers of language models take them. The defaults are off.

    Both penalties look at the tokens chosen so far, not at the prompt: `frequency_penalty` is
    subtracted from a token's logit for each time, `presence_penalty` once. `logit_bias` is added
    to the logits of tokens: -100 all but forbids one, 100 all but forces it, and minus infinity
    forbids it.

    Raises `RequestError` for values out of range.
    """

    frequency_penalty: float = 0.0  # -2 to 2
    presence_penalty: float = 0.0  # -2 to 2
    # -100 to 100 each, or -inf
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)

    def __post_init__(self) -> None:
        for name in ("frequency_penalty", "presence_penalty"):
            check_number(name, getattr(self, name), -MOST_PENALTY, MOST_PENALTY)
        for token, bias in self.logit_bias.items():
            if bias != FORBIDDEN:
                check_number(f"logit_bias of token {token!r:.40}", bias, -MOST_BIAS, MOST_BIAS)

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)

    def applied(
        self, logits: NDArray[np.float32], counts: Mapping[int, int]
    ) -> NDArray[np.float32]:
        """Return a changed copy of logits [V]; `counts` says how often tokens came."""
        changed = logits.copy()
        if counts and (self.frequency_penalty or self.presence_penalty):
            ids, times = _arrays(counts)
            changed[ids] -= self.frequency_penalty * times + self.presence_penalty
        if self.logit_bias:
            ids, biases = _arrays(self.logit_bias)
            changed[ids] += biases
        return changed


def _arrays(values: Mapping[int, float]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    count = len(values)
    return (
        np.fromiter(values.keys(), np.intp, count),
        np.fromiter(values.values(), np.float32, count),
    )


class Constraint(Protocol):
    """What may come next in one text, for example by a grammar. Belongs to one text only."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return which tokens [V] may come next, None for all; the end of the text is one too."""

    def advance(self, token: int) -> None:
        """Take the token that was chosen, which was an allowed one."""


@runtime_checkable
class LeaningConstraint(Constraint, Protocol):
    """One that also finds some of what it allows better than the rest."""

    def bias(self) -> NDArray[np.float32] | None:
        """Return what is added to logits [V], in nats; None for nothing."""


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


class Drawn(NamedTuple):
    """What one token was drawn from: ids [N] and their probabilities, all above 0."""

    ids: Indices
    probabilities: NDArray[np.float64]


class Sampler:
    """Chooses tokens for one sequence; the same seed, stream and logits give the same tokens.

    `stream` numbers the sequences of a batch, so that equal prompts get different samples. Only
    what `constraint` allows is ever chosen. `draws` goes on with random numbers begun elsewhere,
    in place of those of `seed` and `stream`.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        stream: int = 0,
        *,
        penalties: Penalties | None = None,
        constraint: Constraint | None = None,
        draws: np.random.Generator | None = None,
    ) -> None:
        self.sampling = sampling
        self._penalties = penalties if penalties is not None and penalties.active else None
        self._constraint = constraint
        # Told once: to look a protocol up takes longer than to choose a token.
        self._leaning = constraint if isinstance(constraint, LeaningConstraint) else None
        self._chosen = Counter[int]()
        self._random = random_draws(seed, stream) if draws is None else draws
        self._seen: set[int] = set()
        self._scratch = Scratch()
        self.watched = False  # whether `drawn` is wanted
        self.drawn: Drawn | None = None  # of the last token; None where one alone could come

    def observe(self, tokens: Iterable[int]) -> None:
        """Note tokens that stand in the text, for the repetition penalty."""
        if self.sampling.repetition_penalty != 1:
            self._seen.update(tokens)

    def pick(self, logits: Logits | NDArray[np.float16]) -> int:
        """Return a token id for float32 or float16 logits [V], and note it as seen.

        Raises `EdgeMemLLMError` if any logit is NaN or infinite.
        """
        self.drawn = None
        token = self._at_a_glance(logits)
        if token is None:
            token = self._choose(self._scratch.widened(logits))
        self.observe((token,))
        if self._penalties is not None:
            self._chosen[token] += 1
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _at_a_glance(self, logits: NDArray[Any]) -> int | None:
        """Return the likeliest token where that is all and float16 tells it by itself."""
        if logits.dtype != np.float16 or self.sampling.temperature or self._seen:
            return None
        if self._penalties is not None or self._constraint is not None:
            return None
        return place_of_largest(logits)

    def _choose(self, logits: Logits) -> int:
        require_finite(logits)
        if self._seen:
            logits = penalize(logits, self._seen, self.sampling.repetition_penalty)
        if self._penalties is not None:
            logits = self._penalties.applied(logits, self._chosen)
        if self._leaning is not None:
            bias = self._leaning.bias()
            logits = logits if bias is None else logits + bias
        ids = None if self._constraint is None else allowed_ids(self._constraint, logits.size)
        if ids is not None:
            place = self._likeliest_or_drawn(logits[ids])
            if self.drawn is not None:
                self.drawn = Drawn(ids[self.drawn.ids], self.drawn.probabilities)
            return int(ids[place])
        return self._likeliest_or_drawn(logits)

    def _likeliest_or_drawn(self, logits: Logits) -> int:
        return self._draw(logits) if self.sampling.temperature else int(logits.argmax())

    def _draw(self, logits: Logits) -> int:
        ids, probabilities = candidates(logits, self.sampling, self._scratch)
        if self.watched:
            possible = probabilities > 0
            self.drawn = Drawn(ids[possible], probabilities[possible])
        return int(ids[owner(probabilities, self._random.random())])


class Scratch:
    """Memory for choosing among a whole vocabulary, used again for each token.

    Fresh memory of this size comes from the system a page at a time, which costs several times
    more than the arithmetic.
    """

    def __init__(self) -> None:
        self._ids = np.empty(0, np.intp)
        self._weights = np.empty(0)
        self._wide = np.empty(0, np.float32)

    def widened(self, logits: NDArray[Any]) -> Logits:
        """Return logits [V] as float32: themselves, or a copy valid until the next token."""
        if logits.dtype == np.float32:
            return logits
        if len(self._wide) != logits.size:
            self._wide = np.empty(logits.size, np.float32)
        return widen(logits, self._wide)

    def of(self, size: int) -> tuple[Indices, NDArray[np.float64]]:
        """Return the ids [V] from 0 on, and [V] floats that are overwritten by the next token."""
        if len(self._ids) != size:
            self._ids, self._weights = np.arange(size), np.empty(size)
        return self._ids, self._weights


def draw_seed() -> int:
    """Return a fresh seed, small enough to be typed again."""
    return secrets.randbits(32)


def check_seed(seed: object) -> int:
    """Return `seed` if it is an integer in [0, 2^64), else raise `RequestError`."""
    if not is_integer(seed) or not 0 <= seed < SEED_LIMIT:
        raise wrong_value("seed", seed, "an integer from 0 to 2^64 - 1")
    return seed


def random_draws(seed: int, stream: int = 0) -> np.random.Generator:
    """Return the random numbers of a seed, for the sequence of a batch that `stream` numbers."""
    sequence = np.random.SeedSequence(check_seed(seed), spawn_key=(stream,))
    return np.random.Generator(np.random.PCG64(sequence))


def require_finite(logits: Logits) -> None:
    """Raise `EdgeMemLLMError` if any logit is NaN or infinite."""
    finite = np.isfinite(logits)
    if not finite.all():
        raise EdgeMemLLMError(
            f"{np.count_nonzero(~finite)} of {logits.size} logits are NaN or infinite: the graph "
            "overflowed or its weights are damaged. Run 'edge-memllm verify' on the artifact; if "
            "it is whole, export it again."
        )


def next_token_losses(logits: Logits, targets: Sequence[int]) -> NDArray[np.float64]:
    """Return the loss in nats of each target [T] under the logits [T, V] of its position."""
    require_finite(logits)
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(targets)), targets].astype(np.float64)
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64)) - chosen
    return losses


def penalize(logits: Logits, seen: Iterable[int], penalty: float) -> Logits:
    """Return a copy of logits [V] in which the seen tokens are less likely (penalty > 1)."""
    penalized = logits.copy()
    ids = np.fromiter(seen, np.intp)
    values = penalized[ids]
    penalized[ids] = np.where(values < 0, values * penalty, values / penalty)
    return penalized


def candidates(
    logits: Logits, sampling: Sampling, scratch: Scratch | None = None
) -> tuple[Indices, NDArray[np.float64]]:
    """Return the ids that may be drawn and their probabilities, summing to about 1.

    Applies temperature (which must be above 0), top-k, top-p and min-p to logits [V]. The result
    may lie in `scratch`, valid until the next call with it.
    """
    ids, weights = (Scratch() if scratch is None else scratch).of(logits.size)
    if 0 < sampling.top_k < logits.size:
        ids = _top_k(logits, sampling.top_k)
        logits, weights = logits[ids], weights[: ids.size]
    # Subtracting first keeps a tiny temperature from overflowing.
    np.subtract(logits, logits.max(), out=weights, dtype=np.float64)
    np.divide(weights, sampling.temperature, out=weights)
    np.exp(weights, out=weights)
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights >= sampling.min_p * weights.max())
        ids, weights = ids[kept], weights[kept]
    return ids, np.divide(weights, weights.sum(), out=weights)


def _top_k(logits: Logits, k: int) -> Indices:
    last = np.partition(logits, -k)[-k]
    return np.flatnonzero(logits >= last)


def _nucleus(weights: NDArray[np.float64], top_p: float) -> Indices:
    """Return the fewest entries, likeliest first, whose share of the total reaches top_p."""
    target = top_p * weights.sum()
    order = _likeliest(weights, _NUCLEUS_GUESS)
    reached = weights[order].cumsum()
    if reached[-1] < target:
        order = _likeliest(weights, weights.size)
        reached = weights[order].cumsum()
    return order[: int(reached.searchsorted(target)) + 1]


def _likeliest(weights: NDArray[np.float64], count: int) -> Indices:
    """Return the ids of the `count` largest weights, largest first."""
    if count < weights.size:
        ids = np.argpartition(weights, -count)[-count:]
    else:
        ids = np.arange(weights.size)
    return ids[np.argsort(-weights[ids], kind="stable")]


def owner(weights: NDArray[np.float64], point: float) -> int:
    """Return the entry of `weights` in whose share of the total, laid end to end, a point lies.

    `point` is a part of the total, in [0, 1).
    """
    # The last sum is never looked at: a point rounded up to the total still has an owner.
    blocks = np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)).cumsum()
    rest = point * blocks[-1]
    block = int(blocks[:-1].searchsorted(rest, side="right"))
    if block:
        rest -= blocks[block - 1]
    entries = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum()
    return block * _BLOCK + int(entries[:-1].searchsorted(rest, side="right"))


def widen(halves: NDArray[Any], out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Write float16 values into `out`, of the same shape, and return it. Both are contiguous."""
    bits, signed = halves.view(np.uint16), halves.view(np.int16)
    if not bits.size or signed.max() >= _INFINITE or bits.max() >= _INFINITE | _SIGN:
        np.copyto(out, halves)
        return out
    wide = out.view(np.int32)
    np.copyto(wide, signed)
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, _KEPT, out=wide)
    # One product sets all exponents right, those of subnormal numbers among them. It would make
    # numbers of what is infinite or NaN, hence the way above.
    return np.multiply(out, _EXPONENTS_APART, out=out)


def place_of_largest(halves: NDArray[Any]) -> int | None:
    """Return the first place of the largest of float16 values [N], as `argmax` does.

    None if there is no telling from the bits: nothing is above zero, or not all are finite.
    """
    signed = halves.view(np.int16)
    place = int(signed.argmax())  # positive numbers are in the order of their bits
    if not 0 < signed[place] < _INFINITE or halves.view(np.uint16).max() >= _INFINITE | _SIGN:
        return None
    return place
