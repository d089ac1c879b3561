"""From rows to a table file: one pass over them, or two.

Codecs that share parameters between all tokens learn them in a first pass, which keeps statistics
of the rows and not the rows; the second pass writes. Knows rows by what gives them, a network or
another table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_memllm.artifact.layout import TableLayout
from edge_memllm.artifact.manifest import FileSpec, TableSpec
from edge_memllm.artifact.sections import MixedLayout
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision import ExactModel, Sizing, Target, plan_allocation
from edge_memllm.progress import Progress
from edge_memllm.table.source import Rows, counted
from edge_memllm.table.writer import StoredEmbeddings, StoredRows, TableWriter
from edge_memllm_export.texts import TableText


@dataclass(frozen=True)
class MixedFigures:
    """What mixed precision came to. Divergences are those of the table alone, in nats per token.

    They are taken on a sample of the table text.
    """

    target: str
    taken: str
    predicted_kl: float
    measured_kl: float
    compared_tokens: int
    text: str  # what frequencies and sensitivity come from


@dataclass(frozen=True)
class TableForm:
    """How a table is stored."""

    layout: TableLayout
    vocab_size: int
    search: bool = False  # for the best scale of each group
    figures: MixedFigures | None = None  # where bits are mixed
    stored: StoredEmbeddings | None = None  # bytes of embeddings that are known already
    stored_rows: StoredRows | None = None  # those of memory rows


def check_table_options(layout: TableLayout, *, search: bool, text: str | None) -> None:
    """Refuse options that would change nothing with the codec of this layout."""
    codec = layout.codec_id
    if search and not layout.searches:
        raise ExportError(
            f"table search: codec {codec} has no scales to search for. Leave it out, or choose "
            "a codec of 4 bits or less."
        )
    if text is not None and not layout.parameters_bytes:
        raise ExportError(
            f"table text: codec {codec} learns nothing from a text. Leave it out, or choose "
            "codebook, lowrank or mixed precision."
        )


def learned(form: TableForm, source: Rows, text: TableText | None, progress: Progress) -> TableForm:
    """Show all rows to the codec, where it learns from them, and return the form with its levels.

    Each row counts as often as its token stands in the text, plus one; without a text all once.
    Raises ExportError for rows that no codec could learn from.
    """
    counts = None if text is None else np.bincount(text.tokens, minlength=form.vocab_size) + 1
    return _learned(form, source, counts, progress)


def mixed(
    form: TableForm,
    target: Target,
    model: ExactModel,
    text: TableText,
    progress: Progress,
) -> TableForm:
    """Return the form with the mixed codec that suits a target best, its levels learned.

    Raises ExportError as `plan_allocation` and `learned` do.
    """
    sizing = Sizing(target, form.layout, form.vocab_size)
    plan = plan_allocation(model, text.tokens, sizing, search=form.search, progress=progress)
    layout = MixedLayout.of(form.layout, plan.allocation)
    weights = plan.shares * form.vocab_size
    found = _learned(replace(form, layout=layout), model.rows, weights, progress)
    figures = MixedFigures(
        target=str(target),
        taken=sizing.described(sizing.taken(plan.allocation)),
        predicted_kl=plan.predicted_kl,
        measured_kl=plan.measured_kl(found.layout, form.search),
        compared_tokens=sum(map(len, plan.probe.sample.windows)),
        text=text.name,
    )
    return replace(found, figures=figures)


def write_table(
    form: TableForm, source: Rows, path: Path, identity: str, progress: Progress
) -> tuple[TableSpec, FileSpec]:
    """Write a table whose codec has its parameters. Raises ExportError as `TableWriter` does."""
    order = form.layout.stored_order(form.vocab_size)
    with TableWriter(
        path,
        form.layout,
        form.vocab_size,
        identity,
        search=form.search,
        stored=form.stored,
        stored_rows=form.stored_rows,
    ) as writer:
        for embedding, rows in _counted(source, order, "table", progress):
            writer.append(embedding, rows)
        return writer.finish()


def _learned(
    form: TableForm, source: Rows, weights: np.ndarray | None, progress: Progress
) -> TableForm:
    layout = form.layout
    if not layout.parameters_bytes:
        return form
    fit = layout.fit()
    order, seen = layout.stored_order(form.vocab_size), 0
    for _, rows in _counted(source, order, "learning", progress):
        tokens = order[seen : seen + len(rows)]
        _check_finite(rows, tokens)
        fit.add(rows, None if weights is None else weights[tokens].astype(np.float32))
        seen += len(rows)
    return replace(form, layout=layout.with_parameters(fit.parameters()))


def _counted(
    source: Rows, order: np.ndarray, stage: str, progress: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield embeddings [N, D] and rows [N, L, D] of tokens, and say how far it is."""
    chunks = source.chunks(order)
    return counted(chunks, len(order), lambda done, total: progress(stage, done, total))


def _check_finite(rows: np.ndarray, tokens: np.ndarray) -> None:
    """Raise ExportError for rows [N, L, D] that no codec could learn from."""
    finite = np.isfinite(rows).all(axis=2)
    if not finite.all():
        row, layer = np.argwhere(~finite)[0].tolist()
        raise ExportError(
            f"token {tokens[row]}, memory row of layer {layer}: not all values are finite. "
            "Check the checkpoint."
        )
