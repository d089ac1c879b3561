"""What helps against a loss: which part of an artifact it comes from, and what to ask for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_memllm.evaluation.perplexity import divergences
from edge_memllm_export.judging.judged_artifact import JudgedArtifact

_TOKENS = 256  # that the table is tried on

_SMALL_BLOCK, _TARGET = "graph block 32", "a larger target"

# What can be asked of graphs, the least costly first.
_GRAPH_REMEDIES = {
    "int2": ("graph weights int4", "int2 for fewer kinds of matrices (matrix weights)"),
    "int4": (
        "more bits for the head (matrix weights lm_head=int8)",
        _SMALL_BLOCK,
        "graph weights int8",
    ),
    "mixed": (_TARGET, "graph weights int8"),
    "int8": (_SMALL_BLOCK, "graph weights fp16"),
    "fp16": ("graph weights fp32",),
}


def graph_remedy(judged: JudgedArtifact) -> str | None:
    """What would bring a graph nearer to its network; None for one that is exact.

    Nothing is named that the graph has already, and no target where that is one of the rows.
    """
    useless = set()
    if judged.largest_block <= 32:
        useless.add(_SMALL_BLOCK)
    if judged.artifact.manifest.model.memory.layers:
        useless.add(_TARGET)
    known = _GRAPH_REMEDIES.get(judged.artifact.manifest.graph.weights, ())
    named = [each for each in known if each not in useless]
    if len(named) < 2:
        return named[0] if named else None
    return f"{', '.join(named[:-1])}, or {named[-1]}"


def remedy(judged: JudgedArtifact, ids: Sequence[int], mean_kl: float) -> str:
    """Sentences: whose loss of `mean_kl` nats on the tokens it is, and what would help."""
    graph = graph_remedy(judged)
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
