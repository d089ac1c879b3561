"""How sensitive a model is to errors in each layer's rows: the divergence they cause, measured.

One layer at a time is fed coarsely stored and all others as they are. The divergence is close to
a number of the layer's own times the squared error, and the layers' divergences add up, so that
number is all there is to know. Works over any runtime; knows nothing of devices or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Doubles, Floats, Ids
from edge_memllm.artifact.layout import RecordBuffer, TableLayout
from edge_memllm.codecs import GROUPS, Codec, get_codec
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm.progress import Counted
from edge_memllm.runtime_protocol import Runtime

# Learned levels beat the fixed ones of as many bits; from 5 bits on even steps are as good.
_NAMES = ("codebook2", "codebook3", "codebook4", "int5", "int6", "int8")


_COARSE = "int3-g32"
_WINDOW = 256
_CHUNK = 64  # positions whose logits are alive at once
_MOST_TOKENS, _FEWEST_TOKENS = 2048, 512
_BUDGET = 1 << 41  # multiplications


@dataclass(frozen=True)
class Candidates:
    """Codecs by id, their bytes for one layer [C], and their relative squared errors [L, C]."""

    ids: tuple[str, ...]
    sizes: NDArray[np.int64]
    errors: Doubles


def candidate_ids(width: int) -> tuple[str, ...]:
    """Return the ids of the codecs that rows of `width` values can be stored by."""
    return tuple(f"{name}-g{each}" for name in _NAMES for each in GROUPS[::-1] if width % each == 0)


def measure_candidates(rows: Floats, search: bool = False) -> Candidates:
    """Encode rows [N, L, D] by every candidate; `search` for the best scales where one can."""
    width = rows.shape[2]
    ids = candidate_ids(width)
    energy = np.maximum(energies(rows).sum(axis=0), np.finfo(np.float64).tiny)
    sizes, errors = [], []
    for each in ids:
        codec = get_codec(each)
        parts = codec.sizes(1, width)
        sizes.append(parts.scales_bytes + parts.codes_bytes)
        errors.append(energies(coarse_rows(codec, rows, search) - rows).sum(axis=0) / energy)
    return Candidates(ids, np.array(sizes), np.stack(errors, axis=1))


def coarse_rows(codec: Codec, rows: Floats, search: bool = False) -> Floats:
    """Return rows [N, L, D] as they come back from a codec, which learns from them if it learns."""
    _, layers, width = rows.shape
    if codec.parameters_bytes(layers, width):
        fit = codec.fit(layers, width)
        fit.add(rows)
        codec = codec.with_parameters(fit.parameters(), layers, width)
    return codec.decode(*codec.encode(rows, search=search and codec.searches), layers, width)


def energies(rows: Floats) -> Doubles:
    """Return the sums of squares [N, L] of rows [N, L, D]."""
    return np.asarray(np.square(rows).sum(axis=2, dtype=np.float64))


@dataclass(frozen=True)
class Sample:
    """A sample of a text, in windows, and the rows of its tokens as the network computes them."""

    windows: list[Ids]  # ids
    ids: Ids  # distinct ones [U], rising
    embedding: Floats  # [U, D]
    rows: Floats  # [U, L, D]


class RowProbe:
    """A model that is fed rows of our own: a runtime, and how its buffers are laid out."""

    def __init__(self, runtime: Runtime, layout: TableLayout, sample: Sample) -> None:
        """Take the layout of the buffers that the runtime reads; its codec is fed as floats."""
        self.sample = sample
        self._runtime = runtime
        self._layout = layout

    def divergences(
        self, rows: Floats, parts: Sequence[slice], progress: Counted = lambda done, total: None
    ) -> Doubles:
        """Return the mean KL divergence in nats that `rows` [U, L, D] cause in place of the true.

        One figure for each of `parts`: the layers that are replaced, the others being true.
        """
        sums, count = np.zeros(len(parts)), 0
        for number, window in enumerate(self.sample.windows):
            truth = list(self._logits(window, self.sample.rows, slice(0)))
            count += len(window)
            for place, layers in enumerate(parts):
                both = zip(truth, self._logits(window, rows, layers), strict=True)
                sums[place] += sum(divergences(*each).sum() for each in both)
            progress(number + 1, len(self.sample.windows))
        return sums / count

    def _logits(self, window: Ids, rows: Floats, layers: slice) -> Iterator[Floats]:
        """Yield logits [<= chunk, V] of the positions of a window."""
        with closing(self._runtime.new_cache(1)) as cache:
            for start in range(0, len(window), _CHUNK):
                ids, index = np.unique(window[start : start + _CHUNK], return_inverse=True)
                buffer = self._filled(np.searchsorted(self.sample.ids, ids), rows, layers)
                every = np.arange(index.size).reshape(1, -1)
                logits = self._runtime.step(buffer, len(ids), index.reshape(1, -1), cache, every)
                yield np.array(logits[0], np.float32)

    def _filled(self, places: Ids, rows: Floats, layers: slice) -> RecordBuffer:
        """Return a buffer with the true rows of some ids, but `rows` in some layers."""
        count = len(places)
        mixed = self.sample.rows[places]
        mixed[:, layers] = rows[places, layers]
        buffer = RecordBuffer(self._layout, count)
        buffer.embedding(count)[:] = self.sample.embedding[places]
        buffer.wire(count)["memory_rows"][:] = mixed.reshape(count, -1)
        return buffer


def sensitivities(probe: RowProbe, progress: Counted) -> Doubles:
    """Return for each layer [L] the divergence in nats per squared error of a token's row."""
    sample = probe.sample
    coarse = coarse_rows(get_codec(_COARSE), sample.rows)
    found = probe.divergences(coarse, _each_layer(sample.rows.shape[1]), progress)
    occurring = np.searchsorted(sample.ids, np.concatenate(sample.windows))
    errors = energies(coarse - sample.rows)[occurring].mean(axis=0)
    return np.asarray(np.divide(found, errors, out=np.zeros_like(found), where=errors > 0))


def sample_windows(tokens: Ids, vocab_size: int, layout: TableLayout, context: int) -> list[Ids]:
    """Return windows spread evenly over a text; larger models are measured on fewer tokens."""
    window = min(_WINDOW, context)
    layers, width = layout.layers, layout.embedding_width  # of the stream; rows may be narrower
    each = (layers + 2) * (vocab_size * width + 4 * layers * width * width)
    most = max(_FEWEST_TOKENS, min(_MOST_TOKENS, _BUDGET // each))
    count = min(most, len(tokens)) // window
    if count < 2:
        return [tokens[:window]]
    starts = np.arange(count) * (len(tokens) - window) // (count - 1)
    return [tokens[start : start + window] for start in starts.tolist()]


def _each_layer(layers: int) -> list[slice]:
    return [slice(layer, layer + 1) for layer in range(layers)]
