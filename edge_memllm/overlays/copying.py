"""Overlays made of the rows of another table: chosen ones (graft), or those that differ.

Rows stream from table to file in chunks; nothing of the size of a table is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.overlays.composing import plain_codec
from edge_memllm.overlays.overlay import OverlaySpec
from edge_memllm.overlays.writing import OverlayWriter, Written
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer

Progress = Callable[[str, int, int], None]
Path = str | os.PathLike[str]

_CHUNK_BYTES = 8 << 20  # of decoded rows


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tables differ, and the overlay that makes one of the other."""

    written: Written
    compared: int  # rows


def write_graft(
    path: Path,
    spec: OverlaySpec,
    donor: RecordSource,
    tokens: Sequence[int],
    layers: Sequence[int],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write an overlay that gives tokens the rows they have in `donor`, in some layers.

    Rows are copied byte for byte where the overlay's codec is the plain one of the donor's wire
    form. Raises as `OverlayWriter`, and as `Table.fetch`.
    """
    wanted = np.zeros(donor.layout.layers, np.bool_)
    wanted[list(layers)] = True
    with OverlayWriter(path, spec, overwrite=overwrite) as writer:
        ids = np.unique(np.array(tokens, np.int64))
        for chunk, buffer in _chunks(donor, ids, "copying", progress):
            mask = np.broadcast_to(wanted, (len(chunk), len(wanted)))
            _replace(writer, spec, buffer, chunk, mask)
        return writer.finish()


def write_difference(
    path: Path,
    spec: OverlaySpec,
    base: RecordSource,
    changed: RecordSource,
    vocab_size: int,
    *,
    tolerance: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Write an overlay that makes the rows of `base` those of `changed`.

    Only rows that differ are stored: whose difference has a norm above `tolerance` times the norm
    of the base row. Raises `RequestError` for a token whose embedding differs, which no overlay
    can change.
    """
    ids = np.arange(vocab_size)
    chunks = _chunks(changed, ids, "comparing", progress)
    with OverlayWriter(path, spec, overwrite=overwrite) as writer:
        for chunk, buffer in chunks:
            before = RecordBuffer(base.layout, len(chunk))
            base.fetch(chunk, before)
            _check_embeddings(chunk, before, buffer)
            mask = differs(before.rows(len(chunk)), buffer.rows(len(chunk)), tolerance)
            _replace(writer, spec, buffer, chunk, mask)
        written = writer.finish()
    return Difference(written, vocab_size * spec.layers)


def differs(
    base: NDArray[np.float32], changed: NDArray[np.float32], tolerance: float
) -> NDArray[np.bool_]:
    """Return which rows [N, L] of two arrays [N, L, D] differ by more than the tolerance."""
    if not tolerance:
        return np.asarray((base != changed).any(axis=2))
    distance = np.linalg.norm(changed - base, axis=2)
    return np.asarray(distance > tolerance * np.linalg.norm(base, axis=2))


def _chunks(
    table: RecordSource, ids: NDArray[np.int64], stage: str, progress: Progress | None
) -> Iterator[tuple[NDArray[np.int64], RecordBuffer]]:
    """Yield tokens and the buffer that holds their records, valid until the next are asked for."""
    size = max(1, _CHUNK_BYTES // (4 * table.layout.layers * table.layout.width))
    buffer = RecordBuffer(table.layout, min(size, max(1, len(ids))))
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        table.fetch(chunk, buffer)
        yield chunk, buffer
        if progress is not None:
            progress(stage, start + len(chunk), len(ids))


def _replace(
    writer: OverlayWriter,
    spec: OverlaySpec,
    buffer: RecordBuffer,
    tokens: NDArray[np.int64],
    wanted: NDArray[np.bool_],
) -> None:
    """Write the rows [N, L] that are wanted of the records in a buffer."""
    at, layers = np.nonzero(wanted)
    if spec.codec == plain_codec(buffer.layout.codec).id:
        scales, codes = buffer.wire_bytes(len(tokens))
        writer.replace_stored(tokens[at], layers, scales[at, layers], codes[at, layers])
    else:
        writer.replace(tokens[at], layers, buffer.rows(len(tokens))[at, layers])


def _check_embeddings(tokens: NDArray[np.int64], before: RecordBuffer, after: RecordBuffer) -> None:
    same = (before.embedding(len(tokens)) == after.embedding(len(tokens))).all(axis=1)
    if not same.all():
        raise RequestError(
            f"The embedding of token {tokens[int(same.argmin())]} differs between the two models, "
            "and overlays change memory rows only. Train with frozen embeddings."
        )
