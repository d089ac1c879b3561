"""Which matrices get more bits, against trying all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edge_memllm.errors import ExportError
from edge_memllm_export.weights.allocation import (
    Allocation,
    Option,
    fewest_bytes,
    least_damage,
)
from edge_memllm_export.weights.forms import MatrixForm

SMALL, WIDE, LARGE = MatrixForm(4, 64), MatrixForm(4, 32, True), MatrixForm(8, 64)


def options_of(seed: int, matrices: int = 6) -> dict[str, list[Option]]:
    """Three forms of each matrix, larger ones doing less damage, in no order."""
    random = np.random.default_rng(seed)
    options = {}
    for number in range(matrices):
        rows, columns = int(random.integers(8, 40)), 64 * int(random.integers(1, 4))
        damages = np.sort(random.exponential(1, 3))[::-1]
        forms = zip((SMALL, WIDE, LARGE), damages.tolist(), strict=True)
        each = [Option(form, form.stored_bytes(rows, columns), loss) for form, loss in forms]
        options[f"m{number}"] = [each[place] for place in random.permutation(3)]
    return options


def best(options: dict[str, list[Option]], budget: int) -> float:
    every = (
        Allocation(dict(zip(options, each, strict=True))) for each in product(*options.values())
    )
    return min(each.damage for each in every if each.stored <= budget)


def budget_between(options: dict[str, list[Option]], share: float) -> int:
    least = sum(min(option.stored for option in each) for each in options.values())
    most = sum(max(option.stored for option in each) for each in options.values())
    return round(least + share * (most - least))


@pytest.mark.parametrize(
    ("bits", "zeros", "expected"), [(4, False, 36), (4, True, 37), (8, True, 70), (6, False, 56)]
)
def test_bytes_of_a_row_of_two_blocks(bits: int, zeros: bool, expected: int) -> None:
    assert MatrixForm(bits, 32, zeros).stored_bytes(1, 64) == expected


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_damage_is_near_the_least_there_is(seed: int, share: float) -> None:
    options = options_of(seed)
    budget = budget_between(options, share)
    found = least_damage(options, budget)
    assert found.stored <= budget
    dearest = max(max(each.damage for each in some) for some in options.values())
    assert found.damage <= best(options, budget) + dearest


@pytest.mark.parametrize("seed", range(6))
def test_a_lower_limit_takes_more_bytes_that_a_budget_spends_as_well(seed: int) -> None:
    options = options_of(seed)
    limits = [1e9, 5.0, 2.0, 1.0, 0.5, 0.0]
    found = [fewest_bytes(options, limit) for limit in limits]
    assert [each.stored for each in found] == sorted(each.stored for each in found)
    for each in found:
        assert least_damage(options, each.stored).damage <= each.damage + 1e-12


def test_a_limit_is_kept_where_it_can_be() -> None:
    options = options_of(1)
    least = sum(min(option.damage for option in each) for each in options.values())
    assert fewest_bytes(options, 1.5 * least).damage <= 1.5 * least
    assert fewest_bytes(options, 0.5 * least).damage == pytest.approx(least)


def test_shares_of_the_damage_add_up() -> None:
    found = fewest_bytes(options_of(2), 1.0)
    assert sum(found.shares().values()) == pytest.approx(1)
    assert Allocation({"m": Option(SMALL, 1, 0.0)}).shares() == {"m": 0.0}


def test_too_few_bytes_are_refused_with_what_it_takes() -> None:
    options = options_of(3)
    least = budget_between(options, 0)
    with pytest.raises(ExportError, match=f"take {least:,}"):
        least_damage(options, least - 1)
