"""Who gets how many bytes: classes of tokens and their codecs, for the least error in a budget.

What a byte may cost is one number, the price. At a given one, classes take the form that is
cheapest for their tokens and tokens the class that is cheapest for them, in turns until nothing
changes; the price is then sought at which the budget is used up. Knows weights, errors and sizes;
nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Doubles

_TURNS = 40  # at one price; they settle after about ten
_HALVINGS = 24  # of the logarithm of the price: to a few millionths


@dataclass(frozen=True, slots=True)
class Room:
    """What a record holds besides its memory values, and what its size is rounded up to."""

    embedding: int
    alignment: int

    def stored(self, values: int) -> int:
        """Return the bytes of a record with `values` bytes of scales and codes."""
        return -(-(self.embedding + values) // self.alignment) * self.alignment


@dataclass(frozen=True, slots=True)
class Form:
    """Bytes of a record, and the candidate codec of every layer."""

    stored: int
    chosen: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A layer's candidate gives way to a larger one."""

    gain: float  # error taken off per byte where the layer's weight is one
    layer: int
    size: int  # bytes it takes
    chosen: int


def layer_steps(sizes: NDArray[np.int64], errors: Doubles) -> list[Step]:
    """Return the steps of all layers, each layer's in their order with gains falling.

    `sizes` [C] are bytes of one layer by candidate, `errors` [L, C] what each layer loses by them.
    """
    return [
        step
        for layer, each in enumerate(errors)
        for step in _hull_steps(layer, sizes, each, int(sizes.argmin()))
    ]


def class_forms(
    steps: list[Step], sizes: NDArray[np.int64], weights: Doubles, room: Room
) -> list[Form]:
    """Return the forms of a class, one for each size that its records can have, sizes rising.

    `weights` [L] say how much the error of each layer counts in this class.
    """
    smallest = int(sizes.argmin())
    chosen, values = [smallest] * len(weights), int(sizes[smallest]) * len(weights)
    forms = {room.stored(values): tuple(chosen)}
    for step in sorted(steps, key=lambda step: -step.gain * weights[step.layer]):
        chosen[step.layer] = step.chosen
        values += step.size
        forms[room.stored(values)] = tuple(chosen)  # what fits into the same size replaces it
    return [Form(*each) for each in forms.items()]


def _hull_steps(layer: int, sizes: NDArray[np.int64], errors: Doubles, smallest: int) -> list[Step]:
    """Return the steps from the smallest candidate along the lower convex hull."""
    hull = [smallest]
    for place in np.lexsort((errors, sizes)).tolist():
        if sizes[place] == sizes[hull[-1]] or errors[place] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(sizes, errors, hull[-1], place) >= _gain(
            sizes, errors, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(place)
    return [
        Step(_gain(sizes, errors, low, high), layer, int(sizes[high] - sizes[low]), high)
        for low, high in pairwise(hull)
    ]


def _gain(sizes: NDArray[np.int64], errors: Doubles, low: int, high: int) -> float:
    return float((errors[low] - errors[high]) / (sizes[high] - sizes[low]))


@dataclass(frozen=True)
class Problem:
    """What is to be stored. The error of token t in layer l is `weights[t, l] * errors[l, c]`."""

    weights: Doubles  # [V, L]
    errors: Doubles  # [L, C], of each candidate
    sizes: NDArray[np.int64]  # [C], bytes of one layer
    room: Room
    classes: int  # at most

    @property
    def smallest(self) -> int:
        """Bytes of all records when each is as small as can be."""
        tokens, layers = self.weights.shape
        return int(tokens) * self.room.stored(int(self.sizes.min()) * layers)


@dataclass(frozen=True)
class Solution:
    """The class of every token [V], the form of each class, and what comes of it."""

    class_of: NDArray[np.int64]
    forms: list[Form]
    stored: int  # bytes of all records
    error: float


def solve(problem: Problem, budget: int) -> Solution:
    """Return the allocation of least error whose records take at most `budget` bytes.

    `budget` is at least `problem.smallest`. The same problem has the same solution.
    """
    steps = layer_steps(problem.sizes, problem.errors)
    low, high = _prices(steps, problem.weights)
    best = _settle(problem, steps, np.inf)
    for _ in range(_HALVINGS):
        price = float(np.sqrt(low * high))
        found = _settle(problem, steps, price)
        if found.stored > budget:
            low = price
            continue
        high = price
        if found.error <= best.error:
            best = found
    return _spend(problem, best, budget)


def _prices(steps: list[Step], weights: Doubles) -> tuple[float, float]:
    """Return a price at which every step pays, and one at which none does."""
    gains, positive = [step.gain for step in steps], weights[weights > 0]
    if not (gains and positive.size):
        return 1.0, 1.0  # nothing is lost by the smallest forms
    return min(gains) * positive.min() / 1e3, max(gains) * positive.sum() * 1e3


def _settle(problem: Problem, steps: list[Step], price: float) -> Solution:
    """Let classes choose forms and tokens choose classes, in turns, at one price of a byte."""
    class_of = _first_classes(problem.weights, problem.classes)
    forms: list[Form] = []
    for _ in range(_TURNS):
        before, forms = forms, _choose_forms(problem, steps, class_of, price)
        costs = _errors(problem, forms)
        if price < np.inf:
            costs += price * np.array([form.stored for form in forms])
        class_of = costs.argmin(axis=1)
        if forms == before:
            break
    return _solution(problem, class_of, forms)


def _first_classes(weights: Doubles, classes: int) -> NDArray[np.int64]:
    """Split the tokens by weight, the heaviest first, into classes of equally many."""
    order = np.argsort(-weights.sum(axis=1), kind="stable")
    class_of = np.empty(len(order), np.int64)
    class_of[order] = np.arange(len(order)) * classes // len(order)
    return class_of


def _choose_forms(
    problem: Problem, steps: list[Step], class_of: NDArray[np.int64], price: float
) -> list[Form]:
    """Return the cheapest form of each class that has tokens; each form once."""
    chosen = []
    for number in np.unique(class_of).tolist():
        members = class_of == number
        weights = problem.weights[members].sum(axis=0)
        forms = class_forms(steps, problem.sizes, weights, problem.room)
        if price == np.inf:
            return forms[:1]
        each = price * int(members.sum())
        costs = [_error(problem, weights, form) + each * form.stored for form in forms]
        chosen.append(forms[int(np.argmin(costs))])
    return list(dict.fromkeys(chosen))


def _error(problem: Problem, weights: Doubles, form: Form) -> float:
    return float(weights @ problem.errors[np.arange(len(weights)), list(form.chosen)])


def _errors(problem: Problem, forms: list[Form]) -> Doubles:
    """Return the error of every token in every form, [V, K]."""
    layers = np.arange(len(problem.errors))
    columns = [problem.errors[layers, list(form.chosen)] for form in forms]
    errors: Doubles = problem.weights @ np.stack(columns, axis=1)
    return errors


def _spend(problem: Problem, found: Solution, budget: int) -> Solution:
    """Move tokens to larger forms while bytes are left, those that gain most per byte first."""
    errors = _errors(problem, found.forms)
    stored = np.array([form.stored for form in found.forms])
    class_of, left = found.class_of.copy(), budget - found.stored
    tokens = np.arange(len(class_of))
    while True:
        more = stored - stored[class_of][:, None]  # bytes [V, K]
        gained = errors[tokens, class_of][:, None] - errors
        useful = (more > 0) & (more <= left) & (gained > 0)
        if not useful.any():
            return _solution(problem, class_of, found.forms)
        rates = np.where(useful, gained / np.maximum(more, 1), 0)
        target = rates.argmax(axis=1)
        order = np.argsort(-rates.max(axis=1), kind="stable")[: int(useful.any(axis=1).sum())]
        taken = np.cumsum(more[order, target[order]])
        moved = order[taken <= left]
        class_of[moved] = target[moved]
        left -= int(taken[len(moved) - 1])


def _solution(problem: Problem, class_of: NDArray[np.int64], forms: list[Form]) -> Solution:
    """Put what was found together; forms that no token has are left out."""
    used, class_of = np.unique(class_of, return_inverse=True)
    forms = [forms[number] for number in used.tolist()]
    stored = np.array([form.stored for form in forms])
    errors = _errors(problem, forms)[np.arange(len(class_of)), class_of]
    return Solution(class_of, forms, int(stored[class_of].sum()), float(errors.sum()))
