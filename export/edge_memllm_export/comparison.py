"""Do two artifacts of one model compute the same? A short look at the logits of both.

Not a measurement of quality, which wants more text: `edge-memllm eval --reference` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from edge_memllm.artifact import Artifact
from edge_memllm.feeding import Feeder
from edge_memllm.table import Table
from edge_memllm_runtimes import open_runtime

_TOKENS = 64


def compare_artifacts(reference: Path, other: Path) -> tuple[float, int]:
    """Return the mean KL divergence (nats) from `reference` to `other`, and over how many tokens.

    The tokens are spread over the vocabulary, so rows of rare tokens count as much as others.
    """
    with Artifact.open(reference) as artifact:
        model = artifact.manifest.model
        count = min(_TOKENS, model.max_position_embeddings, model.vocab_size)
    ids = np.random.default_rng(0).permutation(model.vocab_size)[:count].tolist()
    truth, found = (_log_probabilities(path, ids) for path in (reference, other))
    divergence = (np.exp(truth) * (truth - found)).sum(axis=1)
    return float(divergence.mean()), count


def _log_probabilities(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Float64 [T, V]."""
    with (
        Artifact.open(path) as artifact,
        closing(Table.open(artifact, "pread")) as table,
        closing(open_runtime(artifact, "cpu")) as runtime,
        Feeder(runtime, table, 1, len(ids)) as feeder,
    ):
        logits = feeder.score(0, ids).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
