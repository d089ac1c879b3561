"""The forms that a class of tokens can be stored in, from the smallest to the largest.

A form names the codec of every layer. From one to the next, bytes go to the layer where they take
off most error: best for every size on the way, as each layer's steps lie on a convex hull.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Sizes = NDArray[np.int64]


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


def layer_steps(sizes: Sizes, errors: Values) -> list[Step]:
    """Return the steps of all layers, each layer's in their order with gains falling.

    `sizes` [C] are bytes of one layer by candidate, `errors` [L, C] what each layer loses by them.
    """
    return [
        step
        for layer, each in enumerate(errors)
        for step in _hull_steps(layer, sizes, each, int(sizes.argmin()))
    ]


def class_forms(steps: list[Step], sizes: Sizes, weights: Values, room: Room) -> list[Form]:
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


def _hull_steps(layer: int, sizes: Sizes, errors: Values, smallest: int) -> list[Step]:
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


def _gain(sizes: Sizes, errors: Values, low: int, high: int) -> float:
    return float((errors[low] - errors[high]) / (sizes[high] - sizes[low]))
