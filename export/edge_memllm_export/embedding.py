"""How the table stores embeddings: as asked for, on the checkpoint's own grid, or by default.

Blocks of a GGUF file that some codec holds bit for bit are stored as they are. Where the network
scales its embeddings, codes stay and the scales are multiplied and rounded to float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_memllm.arrays import Bytes, Ids
from edge_memllm.codecs import EmbeddingForm, codec_id, embedding_form
from edge_memllm.codecs.wire import pack
from edge_memllm.errors import ExportError
from edge_memllm.table.source import Rows
from edge_memllm.table.writer import StoredEmbeddings
from edge_memllm_export.sources.gguf_grids import Grid

GridRows = Callable[[int, int], Grid | None]  # rows from the first to before the second

# What a dense model's are stored in beside matrices of few bits; the other forms are exact ones.
DENSE_DEFAULT = "int8-g32"
_BLOCK = 32
_LOOKED_AT = 64  # rows that the network's own are compared with
_SAME = 1e-6  # of two products in float32


@dataclass(frozen=True)
class _Kept:
    """The codec that holds a type of blocks, and the code that stands for 0."""

    codec: str
    zero: int = 0
    bits: int = 4
    halves: bool = False  # whether it gives float16, and no more


_KEPT = {
    "Q4_0": _Kept("int4-g32", zero=8),
    "Q4_1": _Kept("int4a-g32", halves=True),
    "Q5_0": _Kept("int5-g32", zero=16, bits=5),
    "Q8_0": _Kept("int8-g32", zero=128, bits=8),
}


@dataclass(frozen=True)
class EmbeddingChoice:
    """The form of embeddings; `stored` where their bytes are known, and what to say of them."""

    form: EmbeddingForm
    stored: StoredEmbeddings | None = None
    notes: tuple[str, ...] = ()


def choose_embedding(
    asked: str | None, default: EmbeddingForm, grid: GridRows, rows: Rows, vocab_size: int
) -> EmbeddingChoice:
    """Choose a form: that of the codec which is asked for, else the grid's, else the default.

    `grid` gives rows of the embedding as the checkpoint stores them, or None; `rows` gives the
    network's own. Raises ExportError for a codec that cannot store embeddings.
    """
    form = default if asked is None else _asked(asked, default)
    first = grid(0, 1)
    if first is None:
        return EmbeddingChoice(form)
    kept = _KEPT.get(first.kind)
    if kept is not None and not (kept.halves and form.dtype == "float32"):
        same = embedding_form(form.width, form.dtype, kept.codec)
        factor = _factor(grid, rows, vocab_size)
        if factor is not None and (asked is None or form == same):
            how = "bit for bit" if factor == 1 else f"its scales times {factor:g}"
            note = f"embeddings: {first.kind} is kept as {kept.codec}, {how}."
            return EmbeddingChoice(same, _stored_grid(grid, kept, factor), (note,))
    if asked is not None:
        return EmbeddingChoice(form)
    note = (
        f"embeddings: {first.kind} is rounded to {form.codec.id}, which does not hold it exactly."
    )
    return EmbeddingChoice(form, notes=(note,))


def default_form(width: int, dtype: str, *, few_bits: bool) -> EmbeddingForm:
    """The form that embeddings have unless they are asked for otherwise, or are on a grid.

    `few_bits` says that it is a dense model, its matrices in 8 bits or less.
    """
    codec = DENSE_DEFAULT if few_bits and width % _BLOCK == 0 else None
    return embedding_form(width, dtype, codec)


def _asked(word: str, default: EmbeddingForm) -> EmbeddingForm:
    try:
        return embedding_form(default.width, default.dtype, codec_id(word, default.width))
    except ValueError as error:
        raise ExportError(f"embedding codec {word}: {error}") from error


def _factor(grid: GridRows, rows: Rows, vocab_size: int) -> float | None:
    """What the network's embeddings are of the grid's; None where that is not one number."""
    ids = np.unique(np.linspace(0, vocab_size - 1, _LOOKED_AT).astype(np.int64))
    found = rows.embeddings(ids)
    stored = np.concatenate([_rows_of(grid, ids[i : i + 1]).weights() for i in range(len(ids))])
    place = np.unravel_index(np.abs(stored).argmax(), stored.shape)
    if stored[place] == 0:
        return None
    factor = float(found[place]) / float(stored[place])
    factor = 1.0 if abs(factor - 1) <= _SAME else factor
    same = np.abs(stored * factor - found) <= _SAME * np.abs(found)
    return factor if same.all() else None


def _stored_grid(grid: GridRows, kept: _Kept, factor: float) -> StoredEmbeddings:
    """The bytes of the codec, of tokens: scales, minima if there are some, packed codes."""

    def stored(ids: Ids) -> Bytes:
        part = _rows_of(grid, ids)
        numbers = [part.scales] if part.minima is None else [part.scales, part.minima]
        halves = np.concatenate(numbers, axis=1) * np.float32(factor)
        codes = (part.codes.astype(np.int16) + kept.zero).astype(np.uint8)
        packed = codes if kept.bits == 8 else pack(codes, kept.bits)
        return np.concatenate([halves.astype("<f2").view(np.uint8), packed], axis=1)

    return stored


def _rows_of(grid: GridRows, ids: Ids) -> Grid:
    """The grid of some rows, in their order."""
    first, last = int(ids.min()), int(ids.max())
    part = grid(first, last + 1)
    assert part is not None  # all rows are of one type
    if len(ids) == last + 1 - first and (np.diff(ids) == 1).all():
        return part
    minima = None if part.minima is None else part.minima[ids - first]
    return Grid(part.kind, part.codes[ids - first], part.scales[ids - first], minima, part.block)
