"""What analyses may ask of a memory, wherever its weights or rows lie.

`edge_memllm.interpretation.network` answers from a checkpoint's weights, `TableMemory` from an
artifact's table, which has rows and no keys. `Features` are what tokens are compared by: rows, or
the coefficients of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from edge_memllm.arrays import Floats, Ids
from edge_memllm.artifact.layout import RecordBuffer, RecordLayout
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.codecs import get_codec
from edge_memllm.errors import RequestError
from edge_memllm.evaluation.perplexity import Predictor
from edge_memllm.interpretation.gates import are_gates, no_keys
from edge_memllm.progress import Counted
from edge_memllm.table.source import Fetched, RecordSource, Rows

Kind = Literal["coefficients", "rows"]

EMBEDDING = -1  # in place of a layer: the tokens' embeddings, for comparison
_CHUNK_BYTES = 16 << 20
_SAMPLE_BYTES = 128 << 20


class Memory(Protocol):
    """M memories (`layers`) of width W for a vocabulary of V tokens; `keys` is K.

    W is that of the stream, D, but for rows that are gates.

    `keys` is None where no FFN-M makes the rows, or its weights are not at hand: `coefficients`
    and `values` raise `RequestError` then.
    """

    @property
    def layers(self) -> int:
        """M, the memory rows of a token."""

    @property
    def keys(self) -> int | None:
        """K."""

    @property
    def width(self) -> int:
        """W."""

    @property
    def vocabulary(self) -> int:
        """V."""

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [N, D] of distinct tokens [N]."""

    def rows(self, layer: int, ids: Ids) -> Floats:
        """Return the rows [N, W] of distinct tokens [N] in a layer, without gain."""

    def coefficients(self, layer: int, ids: Ids, keys: Sequence[int] | None = None) -> Floats:
        """Return c [N, K] of tokens [N] in a layer, or only of the keys that are named."""

    def values(self, layer: int, keys: Sequence[int] | None = None) -> Floats:
        """Return the values [K, D] of a layer, or only of the keys that are named."""


@dataclass(frozen=True, slots=True)
class Block:
    """Vectors [N, W] of some tokens [N] in one layer, which is `EMBEDDING` for embeddings."""

    layer: int
    ids: Ids
    vectors: Floats


class Features(Protocol):
    """Vectors of all tokens in all layers; W numbers each, D in place of W for embeddings."""

    @property
    def kind(self) -> Kind:
        """What the vectors are."""

    @property
    def layers(self) -> int:
        """M."""

    @property
    def vocabulary(self) -> int:
        """V."""

    @property
    def size(self) -> int:
        """W."""

    def vectors(self, layer: int, ids: Ids) -> Floats:
        """Return [N, W] of distinct tokens [N]."""

    def blocks(self, layers: Sequence[int], progress: Counted) -> Iterator[Block]:
        """Yield the vectors of every token in each of the layers, in no order to rely on.

        `progress(done, total)` counts a token once for each layer.
        """


class ComputedFeatures:
    """Of a memory whose weights are at hand: each chunk is computed when it is asked for."""

    def __init__(self, memory: Memory, kind: Kind) -> None:
        self.kind = kind
        self.layers = memory.layers
        self.vocabulary = memory.vocabulary
        self.size = memory.width if kind == "rows" else memory.keys or 0
        self._memory = memory

    def vectors(self, layer: int, ids: Ids) -> Floats:
        """Return [N, W] of distinct tokens [N]."""
        found = np.empty((len(ids), self._width(layer)), np.float32)
        for part in _parts(len(ids), 4 * self.size):
            found[part] = self._some(layer, ids[part])
        return found

    def blocks(self, layers: Sequence[int], progress: Counted) -> Iterator[Block]:
        """Yield the vectors of every token: one layer after the other."""
        done, total = 0, len(layers) * self.vocabulary
        for layer in layers:
            for part in _parts(self.vocabulary, 4 * self.size):
                ids = np.arange(part.start, part.stop)
                yield Block(layer, ids, self._some(layer, ids))
                done += len(ids)
                progress(done, total)

    def _some(self, layer: int, ids: Ids) -> Floats:
        if layer == EMBEDDING:
            return self._memory.embeddings(ids)
        of = self._memory.rows if self.kind == "rows" else self._memory.coefficients
        return of(layer, ids)

    def _width(self, layer: int) -> int:
        return self._memory.width if layer == EMBEDDING else self.size


class TableMemory:
    """The rows of a model's records, as a memory without keys and as features.

    A record holds all layers, so that a pass over the table serves any number of them.
    """

    kind: Kind = "rows"
    keys: int | None = None

    def __init__(self, model: Predictor) -> None:
        """Take a model that stays open; raises `RequestError` for a dense one."""
        spec = model.manifest.model
        if not spec.memory.layers:
            raise RequestError(
                "This model has no token memory (dense): there is none to look into. Take a model "
                "that has one."
            )
        self.layers = spec.memory.layers
        self.width = self.size = spec.memory.width
        self.vocabulary = spec.vocab_size
        self._spec = spec
        self._source = model.source

    def coefficients(self, layer: int, ids: Ids, keys: Sequence[int] | None = None) -> Floats:
        """Refuse: a table holds what keys gave, not the keys; gates have none."""
        raise no_keys() if are_gates(self._spec.memory) else _no_keys()

    def values(self, layer: int, keys: Sequence[int] | None = None) -> Floats:
        """Refuse, as `coefficients` does."""
        return self.coefficients(layer, np.empty(0, np.int64), keys)

    def rows(self, layer: int, ids: Ids) -> Floats:
        """Return the rows [N, W] of distinct tokens [N], without gain."""
        return self.vectors(layer, ids)

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [N, D] of distinct tokens [N]."""
        return self.vectors(EMBEDDING, ids)

    def vectors(self, layer: int, ids: Ids) -> Floats:
        """Return [N, W] of distinct tokens [N], of embeddings [N, D]."""
        width = self._spec.hidden_size if layer == EMBEDDING else self.width
        found = np.empty((len(ids), width), np.float32)
        for part in _parts(len(ids), 4 * (self.layers * self.width + self._spec.hidden_size)):
            if layer == EMBEDDING:
                found[part] = self._source.embeddings(ids[part])
            else:
                found[part] = self._source.rows(ids[part])[:, layer]
        return found

    def blocks(self, layers: Sequence[int], progress: Counted) -> Iterator[Block]:
        """Yield the vectors of every token: one pass, each chunk in all layers."""
        order = self._source.layout.stored_order(self.vocabulary)
        start, every = 0, len(layers)
        for embedding, rows in self._source.chunks(order):
            ids = order[start : start + len(embedding)]
            start += len(ids)
            for layer in layers:
                vectors = embedding if layer == EMBEDDING else np.ascontiguousarray(rows[:, layer])
                yield Block(layer, ids, vectors)
            progress(start * every, len(order) * every)


def features_of(source: Memory, kind: Kind | None = None) -> Features:
    """Return the vectors that tokens are compared by; None takes coefficients where there are any.

    Raises `RequestError` for coefficients of a memory that has none.
    """
    if kind is None:
        kind = "rows" if source.keys is None else "coefficients"
    if kind == "coefficients" and source.keys is None:
        raise RequestError("This memory has no keys, so there are no coefficients. Ask for rows.")
    return source if isinstance(source, TableMemory) else ComputedFeatures(source, kind)


def check_layers(layers: Sequence[int], memories: int) -> None:
    """Raise `RequestError` for a layer that has no memory of its own, or one named twice."""
    for layer in layers:
        if not 0 <= layer < memories:
            raise RequestError(
                f"layer {layer} has no memory of its own, those that have are 0 to {memories - 1}."
            )
    if not layers or len(set(layers)) < len(layers):
        raise RequestError(f"layers are {list(layers)}, expected at least one, and each once.")


def sample_tokens(features: Features, most: int, seed: int) -> Ids:
    """Return at most `most` tokens, rising, drawn so that their vectors stay below 128 MiB."""
    most = min(most, _SAMPLE_BYTES // (4 * features.size))
    if features.vocabulary <= most:
        return np.arange(features.vocabulary)
    drawn = np.random.default_rng(seed).choice(features.vocabulary, most, replace=False)
    return np.sort(drawn)


def unit(vectors: Floats) -> Floats:
    """Return vectors [N, W] at length one; those of zeros stay as they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Floats = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return scaled


def _no_keys() -> RequestError:
    return RequestError(
        "An artifact has no keys: its table holds their sums. Give the checkpoint it was exported "
        "from."
    )


def _parts(count: int, each: int) -> list[slice]:
    """Cut `count` things of `each` bytes into parts of bounded size."""
    step = max(1, _CHUNK_BYTES // each)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class NetworkRecords(RecordSource):
    """The records of a checkpoint, float32: computed, where a table would read them."""

    reader_name = "network"

    def __init__(self, rows: Rows, memory: MemorySpec, width: int) -> None:
        """Take what computes rows, how many and how wide they are, and the width of the stream."""
        self._rows = rows
        codec = get_codec("f32" if memory.layers else "none")
        self.layout = RecordLayout(
            memory.layers, memory.width or width, codec, "float32", embedding_width=width
        )

    def announce(self, ids: Iterable[int]) -> None:
        """Nothing can be read ahead."""

    def fetch(self, ids: Ids, buffer: RecordBuffer) -> Fetched:
        """Compute the record of `ids[i]` into slot i of `buffer`."""
        buffer.embedding(len(ids))[:] = self._rows.embeddings(ids)
        for wire in buffer.wire(len(ids)).values():
            wire[:] = self._rows.rows(ids).reshape(len(ids), -1)
        return Fetched(0, 0)
