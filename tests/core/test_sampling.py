from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.sampling import (
    Sampler,
    Sampling,
    Scratch,
    candidates,
    check_seed,
    draw_seed,
    owner,
    penalize,
)
from support.checkpoints import MakeCheckpoint


def logits_of(seed: int, size: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def drawn(sampling: Sampling, seed: int, stream: int = 0, count: int = 40) -> list[int]:
    sampler = Sampler(sampling, seed, stream)
    return [sampler.pick(logits_of(step, 200)) for step in range(count)]


def test_the_default_takes_the_likeliest_token() -> None:
    logits = np.array([0.5, 2.0, -1.0, 2.0], np.float32)
    assert Sampler(Sampling(), seed=0).pick(logits) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, r"temperature is -0\.1, expected a number >= 0"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", float("inf"), "temperature is inf"),
        ("temperature", 10**400, "temperature is 1000"),
        ("temperature", "hot", "temperature is 'hot'"),
        ("temperature", True, "temperature is True"),
        ("top_p", 0.0, "top_p is 0.0, expected a number above 0 and at most 1"),
        ("top_p", 1.01, "top_p is 1.01"),
        ("min_p", -0.01, "min_p is -0.01, expected a number from 0 to 1"),
        ("min_p", 2, "min_p is 2"),
        ("repetition_penalty", 0, "repetition_penalty is 0, expected a number above 0"),
        ("top_k", -1, "top_k is -1, expected an integer >= 0"),
        ("top_k", 2.5, "top_k is 2.5"),
        ("top_k", True, "top_k is True"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sampling(**{field: value})


def test_a_generation_config_without_sampling_is_greedy_but_keeps_its_penalty() -> None:
    config = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2, "other": 1}
    assert Sampling.from_generation_config(config) == Sampling(repetition_penalty=1.2)
    assert Sampling.from_generation_config({}) == Sampling()
    assert Sampling.from_generation_config({"do_sample": None}) == Sampling()


def test_a_generation_config_with_sampling_gives_its_values() -> None:
    config = {"do_sample": True, "top_k": 40, "top_p": 0.9, "min_p": None}
    expected = Sampling(temperature=1.0, top_k=40, top_p=0.9)
    assert Sampling.from_generation_config(config) == expected


@pytest.mark.parametrize("stated", [{}, {"top_k": 7}, {"top_k": 0}])
def test_what_a_generation_config_leaves_out_is_as_in_transformers(
    make_checkpoint: MakeCheckpoint, stated: dict[str, int]
) -> None:
    from edge_memllm.modeling import MemoryLLMForCausalLM

    network = MemoryLLMForCausalLM.from_pretrained(make_checkpoint(beta=0))
    network.generation_config = GenerationConfig.from_dict({"do_sample": True, **stated})
    done = network.generate(
        torch.tensor([[65, 66]]), max_new_tokens=1, output_scores=True, return_dict_in_generate=True
    )
    kept = int(torch.isfinite(done.scores[0]).sum())
    top_k = Sampling.from_generation_config({"do_sample": True, **stated}).top_k
    assert kept == (top_k or network.config.vocab_size)


@pytest.mark.parametrize("value", ["true", 1, 0, [True]])
def test_a_generation_config_samples_or_not(value: Any) -> None:
    with pytest.raises(RequestError, match=r"do_sample is .*, expected true or false\."):
        Sampling.from_generation_config({"do_sample": value, "temperature": 0.7})


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, True, "1", None])
def test_a_wrong_seed_is_refused(seed: Any) -> None:
    with pytest.raises(RequestError, match=r"seed is .*, expected an integer from 0 to 2\^64 - 1"):
        check_seed(seed)


def test_a_drawn_seed_can_be_given_again() -> None:
    assert check_seed(draw_seed()) >= 0


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    sampling = Sampling(temperature=1.5)
    assert drawn(sampling, seed=7) == drawn(sampling, seed=7)
    assert drawn(sampling, seed=7) != drawn(sampling, seed=8)
    assert drawn(sampling, seed=7) != drawn(sampling, seed=7, stream=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of(0, 50)
    logits[17] = bad
    with pytest.raises(EdgeMemLLMError, match="1 of 50 logits are NaN or infinite"):
        Sampler(Sampling(temperature=temperature), seed=0).pick(logits)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0), seed=1)
    counts = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_the_penalty_counts_the_prompt_and_what_was_picked() -> None:
    logits = np.array([1.0, 0.9, 0.8], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), seed=0)
    sampler.observe([0])
    assert [sampler.pick(logits) for _ in range(3)] == [1, 2, 0]


def test_the_penalty_leaves_the_given_logits_alone() -> None:
    logits = np.array([1.0, -1.0], np.float32)
    np.testing.assert_array_equal(penalize(logits, {0, 1}, 2.0), [0.5, -2.0])
    np.testing.assert_array_equal(logits, [1.0, -1.0])


def test_top_k_keeps_what_ties_with_the_last() -> None:
    ids, _ = candidates(np.array([3, 1, 2, 2], np.float32), Sampling(temperature=1.0, top_k=2))
    assert sorted(ids) == [0, 2, 3]


def test_a_tiny_temperature_does_not_overflow() -> None:
    ids, probabilities = candidates(logits_of(3, 100), Sampling(temperature=1e-30))
    assert probabilities[ids == logits_of(3, 100).argmax()] == 1


@pytest.mark.parametrize("spread", [0.01, 3.0])  # a nucleus beyond the first guess, and within it
def test_the_nucleus_is_the_fewest_tokens_that_reach_p(spread: float) -> None:
    logits = logits_of(5, 4000, spread)
    ids, _ = candidates(logits, Sampling(temperature=1.0, top_p=0.8))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    kept = np.sort(probabilities[ids])
    assert kept.sum() >= 0.8 > kept[1:].sum()
    assert kept[0] >= np.delete(probabilities, ids).max()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 60),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 3),
)
def test_candidates_are_those_of_transformers(
    seed: int,
    size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    torch = pytest.importorskip("torch")
    logits = logits_of(seed, size)
    seen = set(range(0, size, 3))
    chain = [process.RepetitionPenaltyLogitsProcessor(penalty)]
    chain.append(process.TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(process.TopKLogitsWarper(top_k))
    chain += [process.TopPLogitsWarper(top_p), process.MinPLogitsWarper(min_p)]
    scores = torch.from_numpy(logits).double().unsqueeze(0)
    for processor in chain:
        scores = processor(torch.tensor([sorted(seen)]), scores)
    expected = torch.softmax(scores, dim=-1)[0].numpy()

    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    found = np.zeros(size)
    ids, probabilities = candidates(penalize(logits, seen, penalty), sampling)
    found[ids] = probabilities
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sampling", [{"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.01}, {}])
def test_room_that_is_used_again_changes_nothing(sampling: Any) -> None:
    scratch = Scratch()
    for seed, size in enumerate((500, 500, 2000, 40)):
        logits = logits_of(seed, size)
        before = logits.copy()
        found = candidates(logits, Sampling(temperature=0.8, **sampling), scratch)
        for one, other in zip(
            found, candidates(logits, Sampling(temperature=0.8, **sampling)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(logits, before)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=1500),
    point=st.floats(0, 1, exclude_max=True),
)
def test_a_point_belongs_to_the_entry_it_lies_in(weights: list[float], point: float) -> None:
    shares = np.array([*weights, 1.0])  # multiples of a half: every sum is exact
    ends = shares.cumsum()
    place = owner(shares, point)
    assert ends[place] > point * ends[-1]
    assert place == 0 or ends[place - 1] <= point * ends[-1]


def test_a_point_rounded_up_to_the_total_has_an_owner() -> None:
    weights = np.full(2000, 0.1)
    assert owner(weights, float(np.nextafter(1, 0))) == 1999
    assert owner(weights, 1.0) == 1999


@pytest.mark.parametrize("shift", [0.0, -50.0])  # nothing above zero: no short cut
@pytest.mark.parametrize(
    "sampling",
    [{}, {"repetition_penalty": 1.5}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0}],
)
def test_float16_logits_give_the_tokens_that_float32_gives(sampling: Any, shift: float) -> None:
    one, other = Sampler(Sampling(**sampling), 4), Sampler(Sampling(**sampling), 4)
    for step in range(30):
        halves = (logits_of(step, 300) + np.float32(shift)).astype(np.float16)
        assert one.pick(halves) == other.pick(halves.astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_float16_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = logits_of(0, 50).astype(np.float16)
    logits[17] = bad
    with pytest.raises(EdgeMemLLMError, match="1 of 50 logits are NaN or infinite"):
        Sampler(Sampling(temperature=temperature), seed=0).pick(logits)
