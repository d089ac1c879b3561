"""From a network to a table file: one pass over its rows, or two.

Codecs that share parameters between all tokens learn them in a first pass, which keeps statistics
of the rows and not the rows; the second pass writes. Rows are computed anew in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge_memllm.errors import ExportError
from edge_memllm.manifest import FileSpec, TableSpec
from edge_memllm.modeling import MemoryLLMForCausalLM
from edge_memllm.records import RecordLayout
from edge_memllm.table_writer import TableWriter
from edge_memllm.tokenization import Tokenizer
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.table_rows import table_rows

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TableForm:
    """How a table is computed and stored."""

    layout: RecordLayout  # without the parameters of its codec
    device: str
    dtype: torch.dtype  # rows are computed in
    chunk: int | None  # tokens at a time
    search: bool = False  # for the best scale of each group
    weights: np.ndarray | None = None  # how often each token occurs [V], for learning parameters


def write_table(
    source: Checkpoint, form: TableForm, path: Path, identity: str, progress: Progress
) -> tuple[TableSpec, FileSpec]:
    """Write the table of a checkpoint. Raises ExportError as `TableWriter` does."""
    network = source.network(form.device, form.dtype)
    layout = form.layout
    if layout.parameters_bytes:
        layout = layout.with_parameters(_learned(network, form, progress))
    vocabulary = source.config.vocab_size
    with TableWriter(path, layout, vocabulary, identity, search=form.search) as writer:
        for embedding, rows in table_rows(
            network,
            chunk=form.chunk,
            progress=lambda done, total: progress("table", done, total),
        ):
            writer.append(embedding, rows)
        return writer.finish()


def token_weights(source: Checkpoint, text: str) -> np.ndarray:
    """How often each token stands in a text, plus one: float32 [V].

    Raises ExportError when the checkpoint has no tokenizer, or one of another model.
    """
    file, vocabulary = source.path / "tokenizer.json", source.config.vocab_size
    if not file.is_file():
        raise ExportError(
            f"{source.path}: no tokenizer.json, so the tokens of the table text cannot be "
            "counted. Put the tokenizer there, or leave the text out."
        )
    counts = np.bincount(Tokenizer(file.read_bytes()).encode(text), minlength=vocabulary)
    if len(counts) > vocabulary:
        raise ExportError(
            f"{file}: gives token {len(counts) - 1}, the model has {vocabulary}. "
            "The tokenizer is another model's; put the right one into the checkpoint."
        )
    return (counts + 1).astype(np.float32)


def _learned(network: MemoryLLMForCausalLM, form: TableForm, progress: Progress) -> bytes:
    """Show all rows to the codec, and return what it learns from them."""
    fit = form.layout.codec.fit(form.layout.layers, form.layout.width)
    seen = 0
    for _, rows in table_rows(
        network,
        chunk=form.chunk,
        progress=lambda done, total: progress("learning", done, total),
    ):
        _check_finite(rows, seen)
        weights = None if form.weights is None else form.weights[seen : seen + len(rows)]
        fit.add(rows, weights)
        seen += len(rows)
    return fit.parameters()


def _check_finite(rows: np.ndarray, first: int) -> None:
    """Raise ExportError for rows [N, L, D] that no codec could learn from."""
    finite = np.isfinite(rows).all(axis=2)
    if not finite.all():
        row, layer = np.argwhere(~finite)[0].tolist()
        raise ExportError(
            f"token {first + row}, memory row of layer {layer}: not all values are finite. "
            "Check the checkpoint."
        )
