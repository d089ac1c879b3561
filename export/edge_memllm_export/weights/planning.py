"""Which form each matrix of a graph gets, and its codes: by what errors of it cost the network.

One pass back over a text says how much each matrix matters (`damage`). Columns are brought to one
size by factors that cancel (`folding`), every form is weighed (`forms`), and the bytes go where
they take off most (`allocation`). Codes are chosen as the graph asks for its matrices.

The damage of a form is that of its codes and that of inputs rounded to 8 bits. Where the latter are
too much of all that is left, the matrices that mind most get products with inputs as they are,
which take about twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from edge_memllm.arrays import Floats
from edge_memllm.errors import ExportError
from edge_memllm.progress import Counted
from edge_memllm_export.architectures.architecture import Architecture, Reference
from edge_memllm_export.weights.allocation import Allocation, Option, Options
from edge_memllm_export.weights.damage import Sensitivity, measure_sensitivities
from edge_memllm_export.weights.folding import column_factors, folded_moment
from edge_memllm_export.weights.forms import MatrixForm, WeighedMatrix
from edge_memllm_export.weights.own_grids import OwnGrid, own_grid
from edge_memllm_export.weights.stored_matrix import StoredMatrix, StoreMatrix

# What a matrix can be stored in. More blocks of 64 or 128 save little more, 5 and 7 bits have no
# kernel that is worth it, zero points of 2 bits take nothing off.
FORMS = (
    MatrixForm(2, 64),
    MatrixForm(2, 32),
    MatrixForm(4, 64),
    MatrixForm(4, 32),
    MatrixForm(4, 32, zero_points=True),
    MatrixForm(6, 64),
    MatrixForm(6, 32),
    MatrixForm(8, 64),
    MatrixForm(8, 32),
)
# The share of a plan's damage that inputs rounded to 8 bits may have before some are not.
_ROUNDED_INPUTS = 0.5
_MOST_EXACT = 0.25  # of all weights, in matrices whose inputs are not rounded
_SCALES = np.dtype(np.float16)

Choose = Callable[[Options], Allocation]
# Of a matrix by its name and columns: the forms that it may have.
FormsOf = Callable[[str, int], Sequence[MatrixForm]]
# Calls what it is given with every matrix [N, K] of a graph, by name, in the graph's order.
VisitMatrices = Callable[[Callable[[str, np.ndarray], None]], None]


@dataclass(frozen=True)
class WeighedForms:
    """What is known of a matrix before anything is rounded."""

    rows: int
    columns: int
    rounding: Mapping[MatrixForm, float]  # expected damage of the codes, nats per token
    inputs: Mapping[int, float]  # of inputs rounded by blocks of so many
    kept: bool = False  # on a grid of its own, bit for bit

    def options(self, *, exact: bool) -> list[Option]:
        """What it costs in each form; ``exact``: with inputs as they are."""
        return [
            self._option(form, exact=exact)
            for form in self.rounding
            if not exact or self._takes_exact_inputs(form)
        ]

    def _takes_exact_inputs(self, form: MatrixForm) -> bool:
        """Only the kernel of 4 bits is fast with such inputs; 8 bits are twice 4."""
        return 2 not in form.parts and not (self.kept and form.bits == 8)

    def _option(self, form: MatrixForm, *, exact: bool) -> Option:
        chosen = replace(form, level=0) if exact else form
        damage = self.rounding[form] + (0.0 if exact else self.inputs[form.block])
        return Option(chosen, chosen.stored_bytes(self.rows, self.columns), damage)


@dataclass(frozen=True)
class MatrixPlan:
    """A form for each matrix, and the architecture that columns were folded in."""

    architecture: Architecture
    chosen: Mapping[str, Option]
    store: StoreMatrix
    kept: int = 0  # matrices that lie on grids of their own

    @property
    def allocation(self) -> Allocation:
        """The same with what it comes to."""
        return Allocation(self.chosen)


class MatrixPlanner:
    """How much each matrix of a graph matters, and what follows from it."""

    def __init__(
        self, architecture: Architecture, sensitivities: Mapping[str, Sensitivity]
    ) -> None:
        """Take what `measured` found, for all matrices of the graph."""
        self._architecture = architecture
        self._sensitivities = {
            name: in_graph(architecture, name, each) for name, each in sensitivities.items()
        }
        self._factors: dict[str, Floats] = {}
        self._grids: dict[str, OwnGrid] = {}
        self._kept_weights: set[str] = set()  # of these matrices; no factor may touch them

    def weigh(
        self, visit: VisitMatrices, forms: FormsOf, progress: Counted
    ) -> dict[str, WeighedForms]:
        """Weigh the forms of all matrices of the graph, folding their columns."""
        found: dict[str, WeighedForms] = {}

        def weigh(name: str, weight: np.ndarray) -> None:
            wide = weight.astype(np.float32)
            found[name] = self._weigh(name, wide, forms(name, wide.shape[1]))
            progress(len(found), len(self._sensitivities))

        visit(weigh)
        return found

    def plan(self, chosen: Mapping[str, Option]) -> MatrixPlan:
        """Return how the graph's matrices are stored in the forms that were chosen."""

        def store(name: str, weight: np.ndarray) -> Sequence[StoredMatrix]:
            form = chosen[name].form
            if name in self._grids:
                blocks = self._grids[name].stored(weight, form.bits, form.block, _SCALES)
                return [StoredMatrix((blocks,), level=form.level)]
            matrix = self._matrix(name, weight.astype(np.float32))
            return [matrix.stored(form, _SCALES, name)]

        architecture = self._architecture.folded(self._factors)
        return MatrixPlan(architecture, chosen, store, len(self._grids))

    def _weigh(self, name: str, weight: Floats, forms: Sequence[MatrixForm]) -> WeighedForms:
        sensitivity, folding = self._sensitivities[name], self._architecture.folding(name)
        if not np.isfinite(weight).all():
            raise ExportError(f"{name}: a weight is not finite. Mend the checkpoint.")
        rows, columns = weight.shape
        inputs = sensitivity.of_rounded_inputs(weight, {form.block for form in forms})
        grid = own_grid(weight)
        if grid is not None and (kept := [form for form in forms if _holds(form, grid)]):
            self._grids[name] = grid
            self._kept_weights.update(self._architecture.parts(name))
            return WeighedForms(rows, columns, dict.fromkeys(kept, 0.0), inputs, kept=True)
        if folding is not None and self._kept_weights.isdisjoint(folding.divided):
            power = sensitivity.moment.diagonal()
            factors = column_factors(weight, power, folding.shared, folding.width)
            self._factors[name] = factors
            weight = weight * factors
        matrix = self._matrix(name, weight)
        rounding = {form: matrix.measured_share(form) * matrix.expected(form) for form in forms}
        return WeighedForms(rows, columns, rounding, inputs)

    def _matrix(self, name: str, weight: Floats) -> WeighedMatrix:
        """A matrix whose columns have been folded."""
        sensitivity = self._sensitivities[name]
        factors = self._factors.get(name)
        moment = sensitivity.moment
        if factors is not None:
            moment = folded_moment(moment, factors)
        return WeighedMatrix(weight, moment, sensitivity.rows)


def _holds(form: MatrixForm, grid: OwnGrid) -> bool:
    return form.parts == (form.bits,) and not form.zero_points and grid.fits(form.bits, form.block)


def choose_forms(weighed: Mapping[str, WeighedForms], choose: Choose) -> Allocation:
    """Return the forms that ``choose`` picks, inputs kept as they are where that is worth it.

    Matrices whose rounded inputs do most damage for each weight are the first whose products take
    them as they are; there are no more of these than a share of all weights.
    """
    sizes = {name: each.rows * each.columns for name, each in weighed.items()}
    exact: set[str] = set()
    while True:
        options = {name: each.options(exact=name in exact) for name, each in weighed.items()}
        found = choose(options)
        rounded = {
            name: weighed[name].inputs[option.form.block]
            for name, option in found.chosen.items()
            if name not in exact and weighed[name].options(exact=True)
        }
        worst = max(rounded, key=lambda name: rounded[name] / sizes[name], default=None)
        room = _MOST_EXACT * sum(sizes.values()) - sum(sizes[name] for name in exact)
        if worst is None or sizes[worst] > room:
            return found
        if sum(rounded.values()) <= _ROUNDED_INPUTS * found.damage:
            return found
        exact.add(worst)


def delicate_inputs(inputs: Mapping[str, float], sizes: Mapping[str, int], most: float) -> set[str]:
    """Return the matrices whose inputs must not be rounded, so that all others do little damage.

    ``inputs`` is what rounding those of each costs, ``sizes`` its weights, ``most`` what is left to
    be rounded. Those that cost most for each weight, which is for the time they take, are first.
    """
    rest, found = sum(inputs.values()), set()
    for name in sorted(inputs, key=lambda name: -inputs[name] / sizes[name]):
        if rest <= most:
            break
        found.add(name)
        rest -= inputs[name]
    return found


def measured(
    reference: Reference,
    names: Sequence[str],
    windows: Sequence[torch.Tensor],
    progress: Counted,
    *,
    moments: bool = True,
    scratch: Path | None = None,
) -> dict[str, Sensitivity]:
    """Measure on texts, windows [B, T], how much matrices of the graph matter.

    Without ``moments`` only what rounding inputs costs can be told of them; ``scratch`` is a folder
    with room for those of a large network.
    Raises ExportError where what the network makes of them is not finite.
    """
    try:
        found = measure_sensitivities(
            reference.network,
            {name: reference.modules(name) for name in names},
            reference.predicted,
            windows,
            lambda done: progress(done, len(windows)),
            moments=moments,
            scratch=scratch,
        )
    except FloatingPointError as error:
        raise ExportError(
            f"the network's {error} on the calibration text. Mend the checkpoint, or export with "
            "graph weights fp32."
        ) from error
    for name, each in found.items():
        if not np.isfinite(each.moment).all():
            raise ExportError(
                f"{name}: what the network feeds this matrix on the calibration text, or the "
                "gradient there, is not finite. Mend the checkpoint, or name a form and the graph "
                "method rtn."
            )
    return found


def in_graph(architecture: Architecture, name: str, found: Sensitivity) -> Sensitivity:
    """Return the same in the rows and columns of the graph, where heads may be wider."""
    columns = partial(architecture.arranged, name, side="columns")
    rows = architecture.arranged(name, found.rows[:, None], side="rows")[:, 0]
    if not found.moment.size:
        return replace(found, rows=rows)
    moment = columns(columns(found.moment).T)
    if moment.shape == found.moment.shape:
        return replace(found, rows=rows, moment=moment)
    # Zeros that came in make blocks of other inputs; as many of them mind as much.
    inputs = {
        block: np.resize(each, -(-len(moment) // block)) for block, each in found.inputs.items()
    }
    return Sensitivity(moment, rows, inputs)
