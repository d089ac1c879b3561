"""The `cache` of transformers (`past_key_values` before): what one generation holds in the runtime.

Keys and values stay where the runtime has them. Padding on the left never reaches it: each
sequence has its own length there, while transformers counts columns, padding included.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.feeding import Feeder
from edge_memllm.huggingface.reordering import reorder
from edge_memllm.model import Model

Logits = NDArray[np.float32]


class GenerationCache:
    """Keys and values of B sequences. Its memory is freed with it, or by `close`."""

    is_compileable = False
    is_linear: ClassVar[tuple[bool, ...]] = (False,)  # asked of every layer: keys and values grow

    def __init__(self, model: Model, batch: int) -> None:
        """Begin a generation of `batch` sequences. Raises `RequestError` for a closed model."""
        with ExitStack() as opened:
            opened.enter_context(model.in_use())
            feeder = Feeder(model.runtime, model.table, batch, model.prefill_chunk)
            self._feeder = opened.enter_context(feeder)
            self._finalizer = weakref.finalize(self, opened.pop_all().close)
        self._chunk = model.prefill_chunk
        self._columns = 0
        self._padding = np.zeros(batch, np.int64)

    @property
    def batch(self) -> int:
        """Number of sequences, B."""
        return self._feeder.cache.batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns were fed, padding included; the same for every layer."""
        return self._columns

    def append(self, tokens: Sequence[Sequence[int]], padding: Sequence[int], keep: int) -> Logits:
        """Feed T columns to every sequence; return logits [B, keep, V] of the last `keep`.

        The first `padding[b]` of the T tokens of sequence b are not fed; their logits are zeros.
        """
        width = len(tokens[0])
        if width == 1 and not any(padding):
            logits = self._feeder.decode([row[0] for row in tokens])[:, None]
            result: Logits = logits.astype(np.float32)  # a copy: the next step writes over it
        else:
            longest = int(self._feeder.cache.lengths.max()) + width - min(padding)
            self._feeder.cache.ensure(longest)  # once, not again and again for each sequence
            rows = [
                self._append_one(number, row[pads:], keep)
                for number, (row, pads) in enumerate(zip(tokens, padding, strict=True))
            ]
            result = np.stack(rows)
        self._columns += width
        self._padding += np.asarray(padding)
        return result

    def crop(self, max_length: int) -> None:
        """Forget the columns from `max_length` on; below zero, that many of the last ones."""
        length = self._columns + max_length if max_length < 0 else max_length
        if not 0 <= length <= self._columns:
            raise RequestError(
                f"crop to {max_length}: expected at most the {self._columns} columns that are held."
            )
        self._padding = np.minimum(self._padding, length)
        for sequence, padding in enumerate(self._padding):
            self._feeder.cache.truncate(sequence, length - int(padding))
        self._columns = length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence b hold what `beam_idx[b]` held: beam search keeps some and drops others."""
        sources = beam_idx.tolist()
        reorder(self._feeder.cache, sources)
        self._padding = self._padding[sources]

    def close(self) -> None:
        """Free the memory now."""
        self._finalizer()

    def _append_one(self, sequence: int, tokens: Sequence[int], keep: int) -> Logits:
        """Feed one sequence; return logits [keep, V] of its last columns."""
        if keep == 1:
            return self._feeder.prefill(sequence, tokens)[None].copy()
        shown = min(keep, len(tokens))
        if shown < len(tokens):
            self._feeder.skip(sequence, tokens[:-shown])
        last = tokens[len(tokens) - shown :]
        parts = [
            self._feeder.score(sequence, last[start : start + self._chunk]).copy()
            for start in range(0, shown, self._chunk)
        ]
        zeros = np.zeros((keep - shown, parts[0].shape[-1]), np.float32)
        return np.concatenate([zeros, *parts])
