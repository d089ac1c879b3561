"""The one seam between the light core and whatever computes: what a runtime is.

A runtime turns the records of a step into logits. Above it everything is numpy and token ids;
below it everything is a library. It must not know text, sampling or files of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.layout import RecordBuffer

StepLogits: TypeAlias = NDArray[np.float32] | NDArray[np.float16]
# What one sequence holds, by name; and of which dtype and shape that is.
KVState: TypeAlias = Mapping[str, NDArray[Any]]
KVStateLayout: TypeAlias = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


class KVCache(Protocol):
    """Keys and values of one batch of sequences; owned by the generation that asked for it."""

    @property
    def batch(self) -> int:
        """Number of sequences, B."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Valid positions of each sequence, int32 [B]; `Runtime.step` advances them."""

    @property
    def capacity(self) -> int:
        """Positions there is room for now, C."""

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""

    @property
    def closed(self) -> bool:
        """Whether it was closed, or lost its memory and closed itself."""

    @property
    def copies(self) -> bool:
        """Whether `copy` and `swap` can be had here."""

    @property
    def marks(self) -> bool:
        """Whether `mark` keeps anything: some layers keep a window only."""

    def ensure(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is there.

        Raises `RequestError` when that is more than the model's context.
        """

    def rewindable(self, sequence: int, length: int) -> int:
        """Return the most positions, at most `length`, that a sequence can be cut to.

        It is `length` where all positions are kept. Layers that look at a window may keep little
        more than that, and then the beginning of a text that is farther back is lost: it must be
        computed again from where this says, perhaps 0.
        """

    def revocable(self, sequence: int) -> int:
        """Return how many positions can be appended so that each of them can be taken back."""

    def mark(self, sequence: int) -> None:
        """Let the present length stay `rewindable`, and one position before it, if there is room.

        Only a few marks of a text are kept; where all positions are, there is nothing to do.
        """

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from `length` on, which must be `rewindable`."""

    def copy(self, sequence: int, source: int, length: int) -> None:
        """Let `sequence` hold the first `length` positions of `source` and nothing else.

        They must be `rewindable` in `source`, which stays as it is.
        """

    def swap(self, first: int, second: int) -> None:
        """Exchange the places of two sequences."""

    def state_layout(self, length: int) -> KVStateLayout:
        """Return what `state` gives for a sequence of `length` positions: dtypes and shapes.

        It is what going on needs: of layers that look at a window, that.
        """

    def state(self, sequence: int) -> KVState:
        """Return the keys and values of one sequence, exactly; read them before the next step."""

    def load_state(self, sequence: int, length: int, state: KVState) -> None:
        """Let a sequence hold `length` positions that `state` gave, here or in another cache.

        Raises `RequestError` when that is more than the model's context.
        """

    def close(self) -> None:
        """Free the memory; closing twice is fine."""


class Runtime(Protocol):
    """Computes logits. Usable from several threads at once, each with its own cache."""

    @property
    def name(self) -> str:
        """What computes, for people: for example `onnxruntime 1.31.1`."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where it really computes."""

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for `batch` sequences."""

    def step(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        cache: KVCache,
        logits_index: NDArray[np.int64] | None,
        *,
        sequence: int | range | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> StepLogits:
        """Append T tokens to every sequence of `cache` (or to some) and return logits.

        `buffer` holds the `distinct` (U) records of the step in its first slots; `token_index`
        int64 [B, T] says which of them stands at each position. `logits_index` int64 [B, K]
        holds the positions within T whose logits are wanted: the last K, in order; None wants none.

        Without `sequence`, B is the cache's batch and T must be 1 unless B is 1. With a number
        as `sequence`, B is 1 and only that sequence grows; with a range of numbers, B is its
        length, T is 1 and those grow. `memory_gain` [L] replaces the manifest's gains for this
        step.

        Returns [B, K, V] in float32 or the float16 the graph computes in, valid until the next step
        with the same cache.
        Raises `RequestError` when the context is full.
        """

    def close(self) -> None:
        """Free what the runtime holds; closing twice is fine."""
