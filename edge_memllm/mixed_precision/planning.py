"""An allocation for a model and a target: what is measured, what is solved, what comes of it.

Knows rows, a runtime and a text's tokens by what they do; nothing of checkpoints and artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_memllm.codecs.allocation import Allocation
from edge_memllm.codecs.codec import Codec, Floats
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision.candidates import energies, measure_candidates
from edge_memllm.mixed_precision.class_forms import Values
from edge_memllm.mixed_precision.frequencies import token_shares
from edge_memllm.mixed_precision.sensitivity import (
    Ids,
    Sample,
    Subject,
    sample_windows,
    sensitivities,
)
from edge_memllm.mixed_precision.sizing import Sizing
from edge_memllm.records import RecordLayout
from edge_memllm.runtime_protocol import Runtime

Progress = Callable[[str, int, int], None]


class RowSource(Protocol):
    """A model's rows as they are before they are quantised."""

    @property
    def layout(self) -> RecordLayout:
        """How the buffers are laid out that a runtime is fed; the codec is fed as floats."""

    @property
    def context(self) -> int:
        """The most tokens that the model reads at once."""

    def rows(self, ids: Ids) -> tuple[Floats, Floats]:
        """Return embeddings [U, D] and rows [U, L, D] of some tokens."""

    def chunks(self, stage: str, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and rows [N, L, D] of these tokens; `stage` is for progress."""


@dataclass(frozen=True)
class MixedPlan:
    """Who gets which codec, and what that is expected to cost."""

    allocation: Allocation
    shares: Values  # [V], how often each token will come
    predicted_kl: float  # nats per token
    subject: Subject

    def measured_kl(self, codec: Codec, search: bool) -> float:
        """Return the divergence on the sample by the table's codec, its levels learned."""
        sample = self.subject.sample
        rows = np.empty_like(sample.rows)
        class_of = self.allocation.class_of[sample.ids]
        for number, variant in enumerate(codec.variants):
            true = sample.rows[class_of == number]
            stored = variant.encode(true, search=search and variant.searches)
            rows[class_of == number] = variant.decode(*stored, *true.shape[1:])
        return float(self.subject.divergences(rows, [slice(None)])[0])


def plan_allocation(
    source: RowSource,
    runtime: Runtime,
    tokens: Ids,
    sizing: Sizing,
    *,
    search: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> MixedPlan:
    """Find the allocation of least expected divergence; `runtime` computes with the source's rows.

    `tokens` are those of a text like the ones the model is for; `search` says whether the table
    will be stored with the best scales. Raises `ExportError` for a text without tokens and a
    target that cannot be.
    """
    sizing.check()
    if not len(tokens):
        raise ExportError("The table text has no tokens. Give more text, or leave it out.")
    windows = sample_windows(tokens, sizing.vocab_size, sizing.layout, source.context)
    ids = np.unique(np.concatenate(windows))
    subject = Subject(runtime, source.layout, Sample(windows, ids, *source.rows(ids)))
    candidates = measure_candidates(subject.sample.rows, search)
    minded = sensitivities(subject, lambda *done: progress("sensitivity", *done))
    shares = token_shares(tokens, sizing.vocab_size)
    weights = shares[:, None] * minded * _all_energies(source, sizing.vocab_size)
    allocation, predicted = sizing.fill(weights, candidates)
    return MixedPlan(allocation, shares, predicted, subject)


def _all_energies(source: RowSource, vocab_size: int) -> Values:
    chunks = source.chunks("energy", np.arange(vocab_size))
    found = np.concatenate([energies(rows) for _, rows in chunks])
    if not np.isfinite(found).all():
        token, layer = np.argwhere(~np.isfinite(found))[0].tolist()
        raise ExportError(
            f"token {token}, memory row of layer {layer}: not all values are finite. "
            "Check the checkpoint."
        )
    return found
