"""What helps against a loss: which part of an artifact it comes from, and what to ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_memllm.evaluation.perplexity import divergences
from edge_memllm_export.judging.judged_artifact import JudgedArtifact

_TOKENS = 256  # that the table is tried on

# What can be asked of graphs, the least costly first.
_GRAPH_REMEDIES = {
    "int2": "graph weights int4, or int2 for fewer kinds of matrices (matrix weights)",
    "int4": "more bits for the head (matrix weights lm_head=int8), graph block 32, or graph "
    "weights int8",
    "mixed": "a larger target, or graph weights int8",
    "int8": "graph block 32, or graph weights fp16",
    "fp16": "graph weights fp32",
}


def remedy(judged: JudgedArtifact, ids: Sequence[int], mean_kl: float) -> str:
    """Sentences: whose loss of `mean_kl` nats on the tokens it is, and what would help."""
    graph = _GRAPH_REMEDIES.get(judged.artifact.manifest.graph.weights)
    if not judged.artifact.manifest.model.memory.layers:
        return f"Choose {graph or 'another form'}."
    table = _table_kl(judged, ids[:_TOKENS])
    share = f"The table alone costs {table:.3f} of {mean_kl:.3f} nats."
    if graph is None or table > mean_kl / 2:
        return f"{share} Choose a table codec of more bits."
    return f"{share} Choose {graph}."


def _table_kl(judged: JudgedArtifact, ids: Sequence[int]) -> float:
    """Mean KL, nats, from the network to itself fed from the table."""
    ids = list(ids[: judged.artifact.manifest.model.max_position_embeddings])
    distinct = np.unique(ids)
    table, reference = judged.table, judged.reference
    fed = reference.fed_logits(ids, table.embeddings(distinct), table.rows(distinct))
    return float(divergences(next(iter(reference.logits(ids, len(ids)))), fed).mean())
