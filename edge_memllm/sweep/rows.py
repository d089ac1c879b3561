"""The error of a table's rows against the source's: per layer, and per token-frequency class.

Reads both tables once, in chunks; knows nothing of what the error does to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.codecs.codec import Floats
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer

_CHUNK_BYTES = 32 << 20
# The classes a token is in by how often a text has it: from these counts on.
CLASS_STARTS = (0, 1, 2, 10, 100, 1000)

Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerError:
    """The error of one layer's rows of all tokens."""

    largest: float
    rms: float
    relative_rms: float  # to the rms of the source's rows
    cosine: float  # mean over the tokens of that between both rows


@dataclass(frozen=True, slots=True)
class ClassError:
    """The error of the rows of the tokens that a text has `least` to `most` times."""

    least: int
    most: int | None  # None: without end
    tokens: int  # different ones
    rms: float
    relative_rms: float


@dataclass(frozen=True, slots=True)
class RowErrors:
    """The error of all rows: together, by layer, by class (none without a text)."""

    total: LayerError
    layers: list[LayerError]
    classes: list[ClassError]


def measure_rows(
    source: RecordSource,
    table: RecordSource,
    vocabulary: int,
    counts: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RowErrors:
    """Compare the rows of two tables of one model, token by token.

    `counts` [V] says how often each token occurs in a text; None leaves the classes out.
    `progress(done, total)` is called with tokens.
    """
    layers = source.layout.layers
    largest = np.zeros(layers)
    error, power, cosine = np.zeros((3, vocabulary, layers))
    for ids, truth, rows in _chunks(source, table, vocabulary):
        found = rows - truth
        largest = np.maximum(largest, np.abs(found).max(axis=(0, 2)))
        error[ids], power[ids] = _squares(found), _squares(truth)
        cosine[ids] = _cosines((truth * rows).sum(axis=2, dtype=np.float64), power[ids], rows)
        if progress is not None:
            progress(int(ids[-1]) + 1, vocabulary)
    width = source.layout.width
    each = [
        LayerError(float(most), *_rms(error[:, i], power[:, i], width), float(cosine[:, i].mean()))
        for i, most in enumerate(largest)
    ]
    total = LayerError(float(largest.max()), *_rms(error, power, width), float(cosine.mean()))
    return RowErrors(total, each, _classes(counts, error, power, width))


def _chunks(
    source: RecordSource, table: RecordSource, vocabulary: int
) -> Iterator[tuple[NDArray[np.int64], Floats, Floats]]:
    """Yield token ids and the rows [N, L, D] of both tables."""
    layout = source.layout
    count = max(1, _CHUNK_BYTES // (4 * layout.layers * layout.width))
    buffers = [RecordBuffer(each.layout, min(count, vocabulary)) for each in (source, table)]
    for start in range(0, vocabulary, count):
        ids = np.arange(start, min(start + count, vocabulary))
        source.fetch(ids, buffers[0])
        table.fetch(ids, buffers[1])
        yield ids, buffers[0].rows(len(ids)), buffers[1].rows(len(ids))


def _squares(values: Floats) -> Sums:
    """Sums of squares [N, L] of values [N, L, D]."""
    return np.asarray(np.square(values).sum(axis=2, dtype=np.float64))


def _cosines(product: Sums, power: Sums, rows: Floats) -> Sums:
    """Cosines [N, L]; a row of zeros agrees with nothing but a row of zeros."""
    other = _squares(rows)
    norm = np.sqrt(power * other)
    both_zero = (power == 0) & (other == 0)
    return np.where(norm > 0, product / np.where(norm > 0, norm, 1), both_zero.astype(np.float64))


def _rms(error: Sums, power: Sums, width: int) -> tuple[float, float]:
    """Root mean square of the error; and relative to that of the rows, 0 for rows of zeros."""
    total = float(power.sum())
    rms = float(np.sqrt(error.mean() / width))
    return rms, float(np.sqrt(error.sum() / total)) if total else 0.0


def _classes(
    counts: NDArray[np.int64] | None, error: Sums, power: Sums, width: int
) -> list[ClassError]:
    if counts is None:
        return []
    found = []
    for number, least in enumerate(CLASS_STARTS):
        last = number + 1 == len(CLASS_STARTS)
        most = None if last else CLASS_STARTS[number + 1] - 1
        chosen = (counts >= least) & (True if most is None else counts <= most)
        if chosen.any():
            figures = _rms(error[chosen], power[chosen], width)
            found.append(ClassError(least, most, int(chosen.sum()), *figures))
    return found


def class_name(found: dict[str, Any]) -> str:
    """Return a class as people read it: `10 to 99`."""
    least, most = found["least"], found["most"]
    if most is None:
        return f"{least:,} or more"
    return f"{least}" if least == most else f"{least} to {most}"
