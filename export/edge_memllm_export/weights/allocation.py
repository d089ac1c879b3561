"""Which form each matrix of a graph gets: the least damage in so many bytes, or the reverse.

A matrix can be stored in several forms, each with its bytes and the damage it does. The damages of
different matrices add up closely enough, so what a byte buys decides: the matrices take their steps
to larger forms in the order of damage taken off per byte. It knows numbers, no matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision.solver import Step, layer_steps
from edge_memllm_export.weights.forms import MatrixForm


@dataclass(frozen=True, slots=True)
class Option:
    """What a matrix costs in one form: bytes, and nats of divergence per token."""

    form: MatrixForm
    stored: int
    damage: float


Options = Mapping[str, Sequence[Option]]  # by matrix, at least one each


@dataclass(frozen=True, slots=True)
class Allocation:
    """The option that each matrix got."""

    chosen: Mapping[str, Option]

    @property
    def stored(self) -> int:
        """Bytes of all matrices."""
        return sum(option.stored for option in self.chosen.values())

    @property
    def damage(self) -> float:
        """Expected divergence in nats per token: the sum over the matrices."""
        return sum(option.damage for option in self.chosen.values())

    def shares(self) -> dict[str, float]:
        """Return the share of the damage by matrix; all are zero where nothing is damaged."""
        total = self.damage
        return {
            name: option.damage / total if total else 0.0 for name, option in self.chosen.items()
        }


def least_damage(options: Options, budget: int) -> Allocation:
    """Return the allocation of little damage that takes at most ``budget`` bytes.

    A step that no longer fits is left out, and smaller ones after it are still taken.

    Raises:
        ExportError: The smallest forms of all take more.
    """
    chosen = _smallest(options)
    left = budget - Allocation(chosen).stored
    if left < 0:
        raise ExportError(
            f"{budget:,} bytes for the matrices of the graph: in their smallest forms they take "
            f"{budget - left:,}. Allow that much."
        )
    stuck = set()  # the later steps of these begin where they did not get to
    for name, step in _steps(options):
        if name in stuck or step.size > left:
            stuck.add(name)
            continue
        chosen[name] = options[name][step.chosen]
        left -= step.size
    return Allocation(chosen)


def fewest_bytes(options: Options, damage: float) -> Allocation:
    """Return a small allocation of at most ``damage``, else that of the least there is."""
    chosen = _smallest(options)
    left = Allocation(chosen).damage - damage
    for name, step in _steps(options):
        if left <= 0:
            break
        left -= chosen[name].damage - options[name][step.chosen].damage
        chosen[name] = options[name][step.chosen]
    return Allocation(chosen)


def _smallest(options: Options) -> dict[str, Option]:
    return {name: each[int(_sizes(each).argmin())] for name, each in options.items()}


def _steps(options: Options) -> Iterator[tuple[str, Step]]:
    """Yield the steps of all matrices, those that take off most damage per byte first."""
    found = [(name, step) for name, each in options.items() for step in _steps_of(each)]
    yield from sorted(found, key=lambda pair: -pair[1].gain)


def _steps_of(options: Sequence[Option]) -> list[Step]:
    damages = np.array([[option.damage for option in options]], np.float64)
    return layer_steps(_sizes(options), damages)


def _sizes(options: Sequence[Option]) -> np.ndarray:
    return np.array([option.stored for option in options], np.int64)
