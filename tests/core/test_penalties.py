from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.sampling import Penalties, Sampler, Sampling, allowed_ids

SIZE = 12


class Mask:
    def __init__(self, allowed: Any) -> None:
        self.mask = allowed
        self.taken: list[int] = []

    def allowed(self) -> np.ndarray | None:
        return self.mask

    def advance(self, token: int) -> None:
        self.taken.append(token)


def only(*tokens: int) -> np.ndarray:
    return np.isin(np.arange(SIZE), tokens)


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32) * 3


def test_penalties_count_what_was_chosen() -> None:
    penalties = Penalties(frequency_penalty=0.5, presence_penalty=1.0, logit_bias={3: 2.0, 1: -1.0})
    logits = np.zeros(SIZE, np.float32)
    changed = penalties.applied(logits, {1: 2, 5: 1})
    expected = np.zeros(SIZE)
    expected[[1, 3, 5]] = [-2 * 0.5 - 1 - 1, 2, -0.5 - 1]
    np.testing.assert_array_equal(changed, expected)
    assert not logits.any()


def test_the_prompt_is_not_penalized() -> None:
    sampler = Sampler(Sampling(), 0, penalties=Penalties(presence_penalty=2.0))
    logits = np.zeros(SIZE, np.float32)
    logits[4], logits[5] = 1, 0.5
    sampler.observe([4, 5])
    assert [sampler.pick(logits) for _ in range(3)] == [4, 5, 0]


def test_a_bias_forces_and_forbids() -> None:
    logits = logits_of(1)
    best = int(logits.argmax())
    assert Sampler(Sampling(), 0, penalties=Penalties(logit_bias={7: 100})).pick(logits) == 7
    assert Sampler(Sampling(), 0, penalties=Penalties(logit_bias={best: -100})).pick(logits) != best


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@settings(deadline=None)
@given(
    allowed=st.sets(st.integers(0, SIZE - 1), min_size=1),
    seed=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 0.7, 50.0]),
    top_k=st.integers(0, 3),
)
def test_only_what_is_allowed_is_chosen(
    dtype: Any, allowed: set[int], seed: int, temperature: float, top_k: int
) -> None:
    constraint = Mask(only(*allowed))
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k), seed, constraint=constraint)
    chosen = [sampler.pick(logits_of(seed + step).astype(dtype)) for step in range(5)]
    assert set(chosen) <= allowed
    assert constraint.taken == chosen


@settings(deadline=None)
@given(seed=st.integers(0, 50), temperature=st.sampled_from([0.0, 0.8]))
def test_wishes_for_nothing_change_nothing(seed: int, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, repetition_penalty=1.2)
    free = Sampler(sampling, seed)
    bound = Sampler(sampling, seed, penalties=Penalties(), constraint=Mask(None))
    steps = [logits_of(seed + step) for step in range(6)]
    assert [free.pick(each) for each in steps] == [bound.pick(each) for each in steps]


def test_the_likeliest_of_half_precision_is_changed_too() -> None:
    logits = np.array([3, 2, 1], np.float16)
    assert Sampler(Sampling(), 0, penalties=Penalties(logit_bias={2: 5})).pick(logits) == 2


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"frequency_penalty": 2.1}, r"frequency_penalty is 2\.1, expected a number from -2"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan, expected a number"),
        ({"presence_penalty": True}, "presence_penalty is True"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101, expected a number from -100"),
        ({"logit_bias": {5: 10**400}}, "logit_bias of token 5 is 1000"),
        ({"logit_bias": {5: None}}, "logit_bias of token 5 is None"),
    ],
)
def test_a_value_out_of_range_is_refused(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Penalties(**wish)


def test_a_constraint_must_allow_something_of_this_vocabulary() -> None:
    with pytest.raises(EdgeMemLLMError, match="allows no token, not even the end of the text"):
        allowed_ids(Mask(only()), SIZE)
    with pytest.raises(EdgeMemLLMError, match=r"speaks of \(12,\) tokens, the model has 13"):
        allowed_ids(Mask(only(1)), SIZE + 1)
