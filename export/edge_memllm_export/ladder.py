"""The parity ladder: an artifact against its checkpoint, rung by rung.

    1  codec        rows -> bytes -> rows stays within the codec's bound
    2  table        rows and embeddings of the table are the network's
    3  feeding      the network fed with rows computes what it computes without
    4  graph        the graph computes what the network computes from the table's rows
    5  cache        one token at a time gives what the whole sequence gives
    6  chunks       prefill in chunks gives what prefill in one go gives

The first red rung names the fault: each relies only on those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_memllm.codecs import Codec
from edge_memllm.errors import ArtifactError
from edge_memllm.records import RecordLayout
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judged_artifact import JudgedArtifact
from edge_memllm_export.quality import mean_kl, text_tokens
from edge_memllm_export.texts import judging_text

_SPREAD_TOKENS = 64
_SEQUENCE = 48
_ODD_CHUNK = 7
_LOGIT_BOUND = 1e-4  # two float32 computations of the same logits, summed in different orders
# Rows computed in other chunks than here, as a part of the largest value of their layer.
_ROW_SLACK = {"float32": 1e-5, "bfloat16": 0.03}
# Mean KL, nats. What quantisation costs on text is judged by quality.py; here a wrong wire must
# show, which costs whole nats, also on networks with random weights.
_GRAPH_KL_BOUNDS = {"int4": 0.5, "int8": 0.02, "fp16": 1e-3}
_SAME_GRAPH_KL_BOUND = 1e-3


@dataclass(frozen=True)
class Rung:
    """One step of the ladder. It holds when `measured` is at most `bound`."""

    number: int
    name: str
    measured: float
    bound: float
    note: str

    @property
    def ok(self) -> bool:
        """False also when the measurement is not a number."""
        return self.measured <= self.bound


def verify_against(artifact: Path, checkpoint: Path) -> list[Rung]:
    """Climb the ladder for an exported artifact.

    Raises ArtifactError when it was exported from another checkpoint.
    """
    source = Checkpoint.open(checkpoint)
    with JudgedArtifact(artifact, source.network()) as judged:
        found, expected = judged.artifact.manifest.model.identity, source.identity()
        if found != expected:
            raise ArtifactError(
                f"{artifact}: exported from the model {found}, {checkpoint} is {expected}. "
                "Compare it with the checkpoint it came from."
            )
        # How its rows were computed is not on record, so the wider slack has to do.
        return list(climb(judged, "bfloat16"))


def climb(judged: JudgedArtifact, rows_dtype: str) -> Iterator[Rung]:
    """Yield the rungs in order. `rows_dtype` is what the table's rows were computed in."""
    sequence = _sequence(judged)
    ids = np.union1d(sequence, _spread(judged))
    embedding, rows = judged.live_rows(ids)
    yield _codec(judged, ids, rows)
    yield _table(judged, ids, embedding, rows, _ROW_SLACK[rows_dtype])
    used = np.searchsorted(ids, np.unique(sequence))
    yield _feeding(judged, sequence, embedding[used], rows[used])
    yield _graph(judged, sequence)
    whole = _graph_logits(judged, sequence, len(sequence))
    for number, name, chunk in ((5, "cache", 1), (6, "chunks", _ODD_CHUNK)):
        parts = _graph_logits(judged, sequence, chunk)
        yield _compared(judged, number, name, whole, parts, _SAME_GRAPH_KL_BOUND)


def _sequence(judged: JudgedArtifact) -> list[int]:
    """The start of a text; without a tokenizer, tokens spread over the vocabulary."""
    artifact = judged.artifact
    length = min(_SEQUENCE, artifact.manifest.model.max_position_embeddings)
    if "tokenizer.json" in artifact.manifest.files:
        return text_tokens(judged, judging_text(), length)
    return _spread(judged)[:length].tolist()


def _spread(judged: JudgedArtifact) -> np.ndarray:
    """Token ids spread over the vocabulary, first and last among them."""
    last = judged.artifact.manifest.model.vocab_size - 1
    return np.unique(np.linspace(0, last, _SPREAD_TOKENS).astype(np.int64))


def _codec(judged: JudgedArtifact, ids: np.ndarray, rows: np.ndarray) -> Rung:
    layout = judged.table.layout
    decoded, bound = np.empty_like(rows), np.empty_like(rows)
    for codec, part in _codecs(layout, ids):
        decoded[part] = codec.decode(*codec.encode(rows[part]), *rows.shape[1:])
        bound[part] = codec.bound(rows[part])
    measured = _share(np.abs(decoded - rows), bound)
    note = f"largest error of {layout.codec.id}, as a share of its bound"
    return Rung(1, "codec", measured, 1.0, note)


def _codecs(layout: RecordLayout, ids: np.ndarray) -> Iterator[tuple[Codec, np.ndarray]]:
    """The codec of each class of tokens, and which of `ids` it is for."""
    class_of = layout.codec.class_of
    of_ids = np.zeros(len(ids), np.uint8) if class_of is None else class_of[ids]
    for number, codec in enumerate(layout.codec.variants):
        if (part := of_ids == number).any():
            yield codec, part


def _table(
    judged: JudgedArtifact, ids: np.ndarray, embedding: np.ndarray, rows: np.ndarray, slack: float
) -> Rung:
    layout = judged.table.layout
    largest = np.abs(rows).max(axis=2, keepdims=True, initial=0.0)
    bound = slack * largest + np.zeros_like(rows)
    for codec, part in _codecs(layout, ids):
        bound[part] += codec.bound(rows[part])
    half_unit = 2.0**-11 if layout.embedding_dtype == "float16" else 0.0
    embedding_bound = half_unit * np.maximum(np.abs(embedding), 2.0**-14)
    measured = max(
        _share(np.abs(judged.table.rows(ids) - rows), bound),
        _share(np.abs(judged.table.embeddings(ids) - embedding), embedding_bound),
    )
    note = f"largest difference over {len(ids)} tokens, as a share of the bound"
    return Rung(2, "table", measured, 1.0, note)


def _feeding(
    judged: JudgedArtifact, sequence: list[int], embedding: np.ndarray, rows: np.ndarray
) -> Rung:
    computed = next(judged.network_logits(sequence, len(sequence)))
    fed = judged.fed_logits(sequence, embedding, rows)
    measured = float(np.abs(computed - fed).max())
    return Rung(3, "feeding", measured, _LOGIT_BOUND, "largest logit difference")


def _graph(judged: JudgedArtifact, sequence: list[int]) -> Rung:
    distinct = np.unique(sequence)
    table = judged.table
    network = judged.fed_logits(sequence, table.embeddings(distinct), table.rows(distinct))
    graph = _graph_logits(judged, sequence, len(sequence))
    weights = judged.artifact.manifest.graph.weights
    return _compared(judged, 4, "graph", network, graph, _GRAPH_KL_BOUNDS.get(weights, 0.0))


def _compared(
    judged: JudgedArtifact,
    number: int,
    name: str,
    truth: np.ndarray,
    found: np.ndarray,
    kl_bound: float,
) -> Rung:
    """Logits of float32 graphs by their largest difference, of all others by KL divergence."""
    if judged.artifact.manifest.graph.weights == "fp32":
        measured = float(np.abs(truth - found).max())
        return Rung(number, name, measured, _LOGIT_BOUND, "largest logit difference")
    note = f"mean KL divergence over {len(truth)} positions, nats"
    return Rung(number, name, mean_kl(truth, found), kl_bound, note)


def _graph_logits(judged: JudgedArtifact, sequence: list[int], chunk: int) -> np.ndarray:
    return np.concatenate(list(judged.graph_logits(sequence, chunk)))


def _share(error: np.ndarray, bound: np.ndarray) -> float:
    """The largest error as a share of its bound; infinite where a bound of zero is missed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(error == 0, 0.0, error / bound)
    return float(shares.max(initial=0.0))
