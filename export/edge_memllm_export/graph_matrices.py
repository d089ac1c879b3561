"""How a graph's matrices are stored: what an export asks for, turned into what builds the graph.

`auto` is a promise: the smallest forms that keep within a divergence (`PROMISE`), found by what
errors of each matrix cost; of a file whose matrices have grids, these. A budget of bytes asks for
the least damage instead. Named forms are uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edge_memllm.mixed_precision import Target
from edge_memllm.progress import Progress
from edge_memllm_export.architectures.architecture import Architecture
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph.model import GraphForm, build_graph
from edge_memllm_export.weights.allocation import Allocation, fewest_bytes, least_damage
from edge_memllm_export.weights.calibration import calibration_windows
from edge_memllm_export.weights.forms import MatrixForm
from edge_memllm_export.weights.kept_grids import GridStore
from edge_memllm_export.weights.planning import (
    FORMS,
    MatrixPlanner,
    choose_forms,
    delicate_inputs,
    in_graph,
    measured,
)
from edge_memllm_export.weights.quantizer import WEIGHT_FORMS, block_for, kind_of, uniform
from edge_memllm_export.weights.stored_matrix import Blocks, StoredMatrix, StoreMatrix

# Nats per token of expected divergence that `auto` allows, for 2 % of perplexity. Other text than
# the calibration's is hurt up to 1.6 times as much, and chance moves perplexity by tenths of a per
# cent (docs/results/few-bits.md).
PROMISE = 0.006
_TOKENS_FOR_INPUTS = 1024  # to find out which inputs may be rounded where grids are kept
_BLOCK = 32
_NODE_BYTES = 1024  # of a node and its weights, names and alignment included


@dataclass(frozen=True)
class Budget:
    """What a model may take: so many bits for each weight of the graph, or bytes altogether."""

    target: Target
    table_bytes: int

    def matrices(self, weights: int, others: int) -> int:
        """Bytes for all matrices of so many weights, where the graph takes `others` besides."""
        if self.target.bits is not None:
            return int(self.target.bits * weights / 8)
        assert self.target.file_bytes is not None  # one of the two is there
        return self.target.file_bytes - self.table_bytes - others


@dataclass(frozen=True)
class GraphMatrices:
    """What builds a graph, and what its matrices were given."""

    architecture: Architecture
    store: StoreMatrix
    allocation: Allocation | None = None  # None: in one form all, or as the file has them
    kept: GridStore | None = None  # that same store, where grids of a file are kept
    on_grids: int = 0  # matrices of floats that lie on grids of their own


def graph_matrices(
    source: Checkpoint,
    form: GraphForm,
    text: str | None,
    budget: Budget | None,
    scratch: Path,
    progress: Progress,
) -> GraphMatrices:
    """Find out how the matrices of a graph are stored.

    ``text`` is calibrated on, None takes those that come along; without a ``budget`` the promise is
    kept; what does not fit into memory lies in the folder ``scratch``. Raises ExportError for
    weights or a text that cannot be used and for a budget that is too small, StorageError for a
    disk that is full.
    """
    architecture = source.architecture
    if form.weights == "mixed" and form.method is None:
        kept = GridStore(source, _delicate(source, form, text, progress) if form.rounded else None)
        return GraphMatrices(architecture, kept, kept=kept)
    if form.method != "gptq":
        return GraphMatrices(architecture, uniform(form.weights, form.block, form.matrices))

    def visit(each: Callable[[str, np.ndarray], None]) -> None:
        visit_matrices(source, form, each)

    names: list[str] = []
    others = visit_matrices(source, form, lambda name, weight: names.append(name))
    sensitivities = measured(
        architecture.reference(),
        names,
        calibration_windows(source, text),
        lambda done, total: progress("calibration", done, total),
        scratch=scratch,
    )
    planner = MatrixPlanner(architecture, sensitivities)
    weighed = planner.weigh(
        visit, partial(_forms, form), lambda done, total: progress("plan", done, total)
    )
    if budget is None:
        found = choose_forms(weighed, lambda options: fewest_bytes(options, PROMISE))
    else:
        weights = sum(each.rows * each.columns for each in weighed.values())
        most = budget.matrices(weights, others)
        found = choose_forms(weighed, lambda options: least_damage(options, most))
    plan = planner.plan(found.chosen)
    done = iter(range(1, len(names) + 1))

    def counted(name: str, weight: np.ndarray) -> Sequence[StoredMatrix] | None:
        stored = plan.store(name, weight)
        progress("graph", next(done), len(names))
        return stored

    return GraphMatrices(plan.architecture, counted, found, on_grids=plan.kept)


def _delicate(
    source: Checkpoint, form: GraphForm, text: str | None, progress: Progress
) -> set[str]:
    """The matrices whose inputs are not rounded, so that rounding those of all others is little."""
    names: list[str] = []
    visit_matrices(source, form, lambda name, weight: names.append(name))
    found = measured(
        source.architecture.reference(),
        names,
        calibration_windows(source, text, _TOKENS_FOR_INPUTS),
        lambda done, total: progress("calibration", done, total),
        moments=False,
    )
    inputs: dict[str, float] = {}
    sizes: dict[str, int] = {}

    def weigh(name: str, weight: np.ndarray) -> None:
        sensitivity = in_graph(source.architecture, name, found[name])
        inputs[name] = sensitivity.of_rounded_inputs(weight.astype(np.float32), [_BLOCK])[_BLOCK]
        sizes[name] = weight.size

    visit_matrices(source, form, weigh)
    return delicate_inputs(inputs, sizes, form.rounded)


def _forms(form: GraphForm, name: str, columns: int) -> Sequence[MatrixForm]:
    """The forms that a matrix may have: several, or the one that was named."""
    if form.weights == "mixed":
        return FORMS
    _, bits = WEIGHT_FORMS[form.matrices.get(kind_of(name), form.weights)]
    assert bits is not None  # floats are not calibrated
    return (MatrixForm(bits, block_for(columns, form.block)),)


def visit_matrices(
    source: Checkpoint, form: GraphForm, each: Callable[[str, np.ndarray], None]
) -> int:
    """Call ``each`` with all matrices in order, by building a graph whose codes are nothing.

    Returns the bytes that the graph takes besides its matrices, at most.
    """

    def visiting(name: str, weight: np.ndarray) -> list[StoredMatrix]:
        each(name, weight)
        rows, columns = weight.shape
        codes = np.broadcast_to(np.uint8(0), (rows, -(-columns // 32), 16))
        scales = np.broadcast_to(np.float16(0), codes.shape[:2])
        return [StoredMatrix((Blocks(columns, 4, codes, scales),))]

    floats = replace(form, kv_dtype=None)
    model = build_graph(source.spec, source.architecture.build, floats, "", None, visiting)
    values = model.graph.initializers.values()
    named = (value for value in values if not (value.name or "").endswith(("_codes", "_scales")))
    stored = sum(value.const_value.nbytes for value in named if value.const_value is not None)
    return stored + _NODE_BYTES * sum(1 for _ in model.graph)
