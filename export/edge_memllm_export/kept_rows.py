"""How the table stores memory rows: on the checkpoint's own grid, or in the form's codec.

Rows are a matrix of some checkpoints, which a GGUF file may hold in blocks of a few bits; see
`sources.gguf_codecs`. Others compute them, and those are in no blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_memllm.arrays import Floats, Ids
from edge_memllm.codecs import Codec, get_codec
from edge_memllm.table.source import Rows
from edge_memllm.table.writer import StoredRows
from edge_memllm_export.sources.gguf_codecs import GridRows, kept_grid


@dataclass(frozen=True)
class RowsChoice:
    """The codec of memory rows; `stored` where their bytes are known, and what to say of them."""

    codec: Codec
    stored: StoredRows | None = None
    notes: tuple[str, ...] = ()


def choose_rows(
    codec: Codec, grid: GridRows, rows: Rows, vocab_size: int, *, asked: bool, dtype: str
) -> RowsChoice:
    """Choose the codec that holds the grid, unless another was asked for; else the given one.

    `grid` gives rows of the matrix [V, L * W] as the checkpoint stores them, or None; `rows` gives
    the network's own; `dtype` is that of the graph.
    """
    first = grid(0, 1)
    if first is None:
        return RowsChoice(codec)

    def flat(ids: Ids) -> Floats:
        return rows.rows(ids).reshape(len(ids), -1)

    kept = kept_grid(grid, flat, vocab_size, dtype)
    if kept is not None and not (asked and codec.id != kept.codec):
        return RowsChoice(get_codec(kept.codec), kept.stored, (f"memory rows: {kept.note}.",))
    if asked:
        return RowsChoice(codec)
    note = f"memory rows: {first.kind} is rounded to {codec.id}, which does not hold it exactly."
    return RowsChoice(codec, notes=(note,))
