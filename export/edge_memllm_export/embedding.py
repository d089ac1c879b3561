"""How the table stores embeddings: as asked for, on the checkpoint's own grid, or by default.

Blocks of a GGUF file that some codec holds are stored as they are, see `sources.gguf_codecs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_memllm.codecs import EmbeddingForm, codec_id, embedding_form
from edge_memllm.errors import ExportError
from edge_memllm.table.source import Rows
from edge_memllm.table.writer import StoredEmbeddings
from edge_memllm_export.sources.gguf_codecs import GridRows, KeptGrid, kept_grid

# What a dense model's are stored in beside matrices of few bits; the other forms are exact ones.
DENSE_DEFAULT = "int8-g32"
_BLOCK = 32


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
    kept = kept_grid(grid, rows.embeddings, vocab_size, form.dtype)
    if kept is not None:
        same = embedding_form(form.width, form.dtype, kept.codec)
        if asked is None or form == same:
            return EmbeddingChoice(same, _together(kept), (f"embeddings: {kept.note}.",))
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


def _together(kept: KeptGrid) -> StoredEmbeddings:
    """The bytes of embeddings of tokens as a record has them: scales, then codes."""
    return lambda ids: np.concatenate(kept.stored(ids), axis=1)
