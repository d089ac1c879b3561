"""The one seam between the light core and whatever computes: what a runtime is.

A runtime turns the records of a step into logits. Above it everything is numpy and token ids;
below it everything is a library. It must not know text, sampling or files of the table.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_memllm.records import RecordBuffer

StepLogits: TypeAlias = NDArray[np.float32] | NDArray[np.float16]


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

    def ensure(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is there.

        Raises `RequestError` when that is more than the model's context.
        """

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from `length` on."""

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
        sequence: int | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> StepLogits:
        """Append T tokens to every sequence of `cache` (or to one) and return logits.

        `buffer` holds the `distinct` (U) records of the step in its first slots; `token_index`
        int64 [B, T] says which of them stands at each position. `logits_index` int64 [B, K]
        picks the positions within T whose logits are wanted; None wants none.

        Without `sequence`, B is the cache's batch and T must be 1 unless B is 1. With
        `sequence`, B is 1 and only that sequence grows. `memory_gain` [L] replaces the
        manifest's gains for this step.

        Returns [B, K, V] in float32 or the float16 the graph computes in, valid until the next step
        with the same cache.
        Raises `RequestError` when the context is full.
        """

    def close(self) -> None:
        """Free what the runtime holds; closing twice is fine."""
