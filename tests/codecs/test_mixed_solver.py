"""Mixed precision: forms of a class, the solver, frequencies, targets."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.codecs import get_codec
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision import Sizing, Target, target_of
from edge_memllm.mixed_precision.planning import token_shares
from edge_memllm.mixed_precision.sensitivity import Candidates, candidate_ids, measure_candidates
from edge_memllm.mixed_precision.solver import Problem, Room, class_forms, layer_steps, solve

SIZES = np.array([20, 16, 32, 24])
ERRORS = np.array([[0.4, 1.0, 0.01, 0.3], [0.5, 1.0, 0.02, 0.03], [0.9, 0.8, 0.1, 0.2]])


def problem(seed: int, tokens: int = 200, room: Room | None = None, classes: int = 4) -> Problem:
    generator = np.random.default_rng(seed)
    weights = np.exp(generator.normal(0, 2, (tokens, 1)) + generator.normal(0, 1, (1, 3)))
    return Problem(weights, ERRORS, SIZES, room or Room(0, 1), classes)


def largest(asked: Problem) -> int:
    return len(asked.weights) * asked.room.stored(3 * int(SIZES.max()))


def test_steps_of_a_layer_lie_on_its_hull() -> None:
    steps = layer_steps(SIZES, ERRORS)
    assert [step.chosen for step in steps if step.layer == 0] == [0, 2]  # 24 bytes are above it
    assert [step.chosen for step in steps if step.layer == 1] == [0, 3, 2]
    assert [step.chosen for step in steps if step.layer == 2] == [3, 2]  # 20 lose more than 16
    for layer in range(3):
        gains = [step.gain for step in steps if step.layer == layer]
        assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("alignment", [1, 64])
def test_forms_are_the_best_of_their_size_on_the_way(alignment: int) -> None:
    weights, room = np.array([1.0, 3.0, 0.5]), Room(10, alignment)
    forms = class_forms(layer_steps(SIZES, ERRORS), SIZES, weights, room)
    sizes = [form.stored for form in forms]
    assert sizes == sorted(set(sizes))
    assert forms[-1].chosen == (2, 2, 2)
    for form in forms:
        values = int(SIZES[list(form.chosen)].sum())
        assert form.stored == room.stored(values)
        if alignment > 1:
            continue
        best = min(
            weights @ ERRORS[np.arange(3), list(chosen)]
            for chosen in product(range(4), repeat=3)
            if SIZES[list(chosen)].sum() <= values
        )
        assert weights @ ERRORS[np.arange(3), list(form.chosen)] == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    alignment=st.sampled_from([1, 16, 64]),
    classes=st.integers(4, 8),
)
def test_the_budget_is_kept_and_what_all_alike_would_lose_is_not_reached(
    seed: int, share: float, alignment: int, classes: int
) -> None:
    asked = problem(seed, room=Room(8, alignment), classes=classes)
    budget = int(asked.smallest + share * (largest(asked) - asked.smallest))
    found = solve(asked, budget)
    assert found.stored <= budget
    assert len(found.forms) <= classes
    assert sorted(set(found.class_of.tolist())) == list(range(len(found.forms)))
    stored = np.array([form.stored for form in found.forms])
    assert found.stored == stored[found.class_of].sum()
    columns = np.stack([ERRORS[np.arange(3), list(form.chosen)] for form in found.forms])
    error = (asked.weights * columns[found.class_of]).sum()
    assert found.error == pytest.approx(error)
    fitting = [
        asked.weights.sum(axis=0) @ ERRORS[:, each]
        for each, size in enumerate(SIZES)
        if asked.room.stored(3 * int(size)) * len(asked.weights) <= budget
    ]
    assert found.error <= min(fitting) * 1.001


def test_more_bytes_lose_less_and_nothing_is_left_to_chance() -> None:
    asked = problem(1)
    budgets = np.linspace(asked.smallest, largest(asked), 8).astype(int).tolist()
    found = [solve(asked, budget) for budget in budgets]
    errors = [each.error for each in found]
    assert errors == sorted(errors, reverse=True)
    assert found[-1].stored == largest(asked)
    again = solve(asked, budgets[3])
    assert again.forms == found[3].forms
    np.testing.assert_array_equal(again.class_of, found[3].class_of)


def test_what_loses_nothing_is_small() -> None:
    asked = problem(0)
    for weights, errors in ((asked.weights * 0, ERRORS), (asked.weights, ERRORS * 0)):
        found = solve(Problem(weights, errors, SIZES, asked.room, 4), largest(asked))
        assert found.stored == asked.smallest


def test_heavy_tokens_get_more() -> None:
    asked = problem(2)
    found = solve(asked, (asked.smallest + largest(asked)) // 2)
    stored = np.array([form.stored for form in found.forms])[found.class_of]
    order = np.argsort(asked.weights.sum(axis=1))
    assert stored[order[-50:]].mean() > stored[order[:50]].mean()


@given(st.lists(st.integers(0, 30), max_size=80))
def test_shares_are_above_zero_and_sum_up(tokens: list[int]) -> None:
    ids = np.array(tokens, np.int64)
    shares = token_shares(ids, 40)
    assert shares.sum() == pytest.approx(1)
    assert shares.min() > 0
    counts = np.bincount(ids, minlength=40)
    assert (np.argsort(shares, kind="stable") == np.argsort(counts, kind="stable")).all()


def test_unseen_tokens_come_together_as_often_as_those_seen_once() -> None:
    shares = token_shares(np.array([0] * 90 + [1] * 8 + [2, 3], np.int64), 12)
    np.testing.assert_allclose(shares * 102, [90, 8, 1, 1, *[0.25] * 8])
    np.testing.assert_allclose(token_shares(np.arange(3), 3), 1 / 3)


def test_candidates_with_more_bits_lose_less() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2, 128)).astype(np.float32)
    rows[:, 1] *= 30  # errors are relative
    found = measure_candidates(rows)
    assert found.ids == candidate_ids(128)
    assert found.errors.shape == (2, len(found.ids))
    order = np.argsort(found.sizes, kind="stable")
    assert (np.diff(found.errors[:, order[::3]], axis=1) < 0).all()
    np.testing.assert_allclose(found.errors[0], found.errors[1], rtol=0.2)
    searched = measure_candidates(rows, search=True)
    assert searched.errors[:, 0].sum() < found.errors[:, 0].sum()
    assert candidate_ids(96) == tuple(name for name in found.ids if name.endswith("g32"))


def layout(width: int = 128) -> RecordLayout:
    return RecordLayout(2, width, get_codec("f16"), "float16")


def candidates() -> Candidates:
    rows = np.random.default_rng(0).normal(size=(20, 2, 128)).astype(np.float32)
    return measure_candidates(rows)


@pytest.mark.parametrize(
    "target", [Target(bits=2.5), Target(bits=4.25), Target(bits=8.2), Target(file_bytes=420_000)]
)
def test_sizes_are_exact_and_used_up(target: Target) -> None:
    sizing = Sizing(target, layout(), 500)
    weights = np.exp(np.random.default_rng(1).normal(0, 2, (500, 2)))
    sizing.check()
    allocation, error = sizing.fill(weights, candidates())
    limit, taken = target.limit(layout(), 500), sizing.taken(allocation)
    assert 0.98 * limit < taken <= limit
    assert error > 0
    heaviness = np.bincount(allocation.class_of, weights.sum(axis=1))
    heaviness /= np.bincount(allocation.class_of)
    assert (np.diff(heaviness) <= 0).all()  # the class that is read most often lies first


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(bits=1.5), r"target 1\.5 bits: .* takes 2\.\d+ bits to 8\.\d+ bits"),
        (Target(bits=9), "Choose a target in between"),
        (Target(file_bytes=1000), r"target 1,000 bytes: .* takes \d+,\d+ bytes to \d+,\d+ bytes"),
    ],
)
def test_a_target_that_cannot_be_names_those_that_can(target: Target, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Sizing(target, layout(), 500).check()


def test_rows_without_groups_cannot_be_mixed() -> None:
    with pytest.raises(ExportError, match=r"rows of 40 values, expected a multiple of 32"):
        Sizing(Target(bits=4), layout(40), 500).check()


def test_words() -> None:
    assert target_of("mixed-4.5") == Target(bits=4.5)
    assert target_of("mixed-4") == Target(bits=4.0)
    assert [target_of(word) for word in ("int8", "mixed-g32", "mixed-", "mixed-4.")] == [None] * 4
    assert str(Target(file_bytes=1500)) == "1,500 bytes"
