"""Whether an artifact computes what its checkpoint computes: the parity ladder.

    1  codec        rows -> bytes -> rows stays within the codec's bound
    2  table        rows and embeddings of the table are the network's
    3  feeding      the network fed with rows computes what it computes without
    4  graph        the graph computes what the network computes from the table's rows
    5  cache        one token at a time it is as near to the network as all at once
    6  chunks       so it is in chunks

The first red rung names the fault: each relies only on those before it. What codes of few bits
lose is another question, that of `quality`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_memllm.artifact.layout import TableLayout
from edge_memllm.codecs import Codec
from edge_memllm.errors import ArtifactError
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm_export.judging.judged_artifact import JudgedArtifact, text_tokens
from edge_memllm_export.judging.remedies import graph_remedy
from edge_memllm_export.texts import judging_text

_SPREAD_TOKENS = 64
_SEQUENCE = 48
_ODD_CHUNK = 7
_LOGIT_BOUND = 1e-4  # two float32 computations of the same logits, summed in different orders
# Rows computed in other chunks than here, as a part of the largest value of their layer.
_ROW_SLACK = {"float32": 1e-5, "bfloat16": 0.03}
# Mean KL, nats. What quantisation costs is measured on a text; here a wrong wire must
# show, which costs half a nat and more, also on small networks with random weights.
_GRAPH_KL_BOUNDS = {"int2": 5.0, "int4": 0.4, "mixed": 0.4, "int8": 0.02, "fp16": 1e-3}
# How much further from the network a graph may be in parts than whole: nats, and a share of what
# it is off whole. Kernels round one row and many rows in their own ways, and on real networks the
# two results are as far from each other as from the network, yet equally far from that: within a
# tenth. A fault in the parts is an error of its own, and its divergence comes on top.
_PARTS_KL, _PARTS_SHARE = 1e-3, 0.5
# Matrices of 2 bits are so far from the network's that a fault hardly adds to it. In parts such a
# graph is held against itself whole: kernels move it by thousandths of a nat, faults by tenths.
_PARTS_OF_2_BITS = 0.05

_REPORT_THAT = "where that does not hold either, it is a fault of ours, please report it."
_REPORT = "Whatever the options, this is a fault of ours: please report it."


@dataclass(frozen=True)
class ParityCheck:
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

    def refusal(self, judged: JudgedArtifact) -> str:
        """Why an artifact with this step red is refused, and what to try."""
        helps = "compute dtype float32" if self.name == "table" else None
        if self.number >= 4:
            helps = graph_remedy(judged)
        advice = _REPORT if helps is None else f"Export with {helps}: {_REPORT_THAT}"
        return (
            f"Rung {self.number} of the parity ladder, {self.name}, does not hold: {self.note} is "
            f"{self.measured:.3g}, the bound is {self.bound:.3g}. The artifact would not compute "
            f"what the checkpoint computes. {advice}"
        )


def verify_against(artifact: Path, checkpoint: Path) -> list[ParityCheck]:
    """Climb the parity ladder for an exported artifact.

    Raises ArtifactError when it was exported from another checkpoint.
    """
    from edge_memllm_export.checkpoint import Checkpoint

    source = Checkpoint.open(checkpoint)
    with JudgedArtifact(artifact, source.architecture.reference()) as judged:
        found, expected = judged.artifact.manifest.model.identity, source.identity()
        if found != expected:
            raise ArtifactError(
                f"{artifact}: exported from the model {found}, {checkpoint} is {expected}. "
                "Compare it with the checkpoint it came from."
            )
        # How its rows were computed is not on record, so the wider slack has to do.
        return list(parity_checks(judged, "bfloat16"))


def parity_checks(judged: JudgedArtifact, rows_dtype: str) -> Iterator[ParityCheck]:
    """Yield the rungs in order. `rows_dtype` is what the table's rows were computed in."""
    sequence = _sequence(judged)
    ids = np.union1d(sequence, _spread(judged))
    live = judged.reference.rows()
    embedding, rows = live.embeddings(ids), live.rows(ids)
    yield _codec(judged, ids, rows)
    yield _table(judged, ids, embedding, rows, _ROW_SLACK[rows_dtype])
    used = np.searchsorted(ids, np.unique(sequence))
    yield _feeding(judged, sequence, embedding[used], rows[used])
    network = _fed_logits(judged, sequence)
    whole = judged.logits(sequence, len(sequence))
    yield _graph(judged, network, whole)
    for number, name, chunk in ((5, "cache", 1), (6, "chunks", _ODD_CHUNK)):
        parts = judged.logits(sequence, chunk)
        yield _parts(judged, number, name, network, whole, parts)


def _sequence(judged: JudgedArtifact) -> list[int]:
    """The start of a text; without a tokenizer, tokens spread over the vocabulary."""
    artifact = judged.artifact
    length = min(_SEQUENCE, artifact.manifest.model.max_position_embeddings)
    if TOKENIZER_FILE in artifact.manifest.files:
        return text_tokens(judged, judging_text(), length)
    return _spread(judged)[:length].tolist()


def _spread(judged: JudgedArtifact) -> np.ndarray:
    """Token ids spread over the vocabulary, first and last among them."""
    last = judged.artifact.manifest.model.vocab_size - 1
    return np.unique(np.linspace(0, last, _SPREAD_TOKENS).astype(np.int64))


def _codec(judged: JudgedArtifact, ids: np.ndarray, rows: np.ndarray) -> ParityCheck:
    layout = judged.table.layout
    decoded, bound = np.empty_like(rows), np.empty_like(rows)
    for codec, part in _codecs(layout, ids):
        decoded[part] = codec.decode(*codec.encode(rows[part]), *rows.shape[1:])
        bound[part] = codec.bound(rows[part])
    measured = _share(np.abs(decoded - rows), bound)
    note = f"largest error of {layout.codec_id}, as a share of its bound"
    return ParityCheck(1, "codec", measured, 1.0, note)


def _codecs(layout: TableLayout, ids: np.ndarray) -> Iterator[tuple[Codec, np.ndarray]]:
    """The codec of each section, and which of `ids` it is for."""
    section_of = layout.sections_of(ids)
    for number, kind in enumerate(layout.kinds):
        if (part := section_of == number).any():
            yield kind.codec, part


def _table(
    judged: JudgedArtifact, ids: np.ndarray, embedding: np.ndarray, rows: np.ndarray, slack: float
) -> ParityCheck:
    layout = judged.table.layout
    largest = np.abs(rows).max(axis=2, keepdims=True, initial=0.0)
    bound = slack * largest + np.zeros_like(rows)
    for codec, part in _codecs(layout, ids):
        bound[part] += codec.bound(rows[part])
    measured = max(
        _share(np.abs(judged.table.rows(ids) - rows), bound),
        _share(np.abs(judged.table.embeddings(ids) - embedding), layout.embedding.bound(embedding)),
    )
    note = f"largest difference over {len(ids)} tokens, as a share of the bound"
    return ParityCheck(2, "table", measured, 1.0, note)


def _feeding(
    judged: JudgedArtifact, sequence: list[int], embedding: np.ndarray, rows: np.ndarray
) -> ParityCheck:
    computed = next(judged.reference.logits(sequence, len(sequence)))
    fed = judged.reference.fed_logits(sequence, embedding, rows)
    measured = float(np.abs(computed - fed).max())
    return ParityCheck(3, "feeding", measured, _LOGIT_BOUND, "largest logit difference")


def _fed_logits(judged: JudgedArtifact, sequence: list[int]) -> np.ndarray:
    """What the network computes from the table's rows, [T, V]."""
    distinct = np.unique(sequence)
    table = judged.table
    return judged.reference.fed_logits(sequence, table.embeddings(distinct), table.rows(distinct))


def _graph(judged: JudgedArtifact, network: np.ndarray, whole: np.ndarray) -> ParityCheck:
    weights = judged.weights
    if weights == "fp32":
        return _exact(4, "graph", network, whole)
    measured = float(divergences(network, whole).mean())
    note = f"mean KL divergence over {len(network)} positions, nats"
    return ParityCheck(4, "graph", measured, _GRAPH_KL_BOUNDS.get(weights, 0.0), note)


def _parts(
    judged: JudgedArtifact,
    number: int,
    name: str,
    network: np.ndarray,
    whole: np.ndarray,
    parts: np.ndarray,
) -> ParityCheck:
    """Logits of float32 graphs by their difference, of others by how far both are off."""
    weights = judged.weights
    if weights == "fp32":
        return _exact(number, name, whole, parts)
    if weights == "int2":
        measured = float(divergences(whole, parts).mean())
        note = f"mean KL divergence over {len(network)} positions from the graph whole, nats"
        return ParityCheck(number, name, measured, _PARTS_OF_2_BITS, note)
    near, found = (float(divergences(network, logits).mean()) for logits in (whole, parts))
    more = max(found - near, 0.0)  # in this order what is no number stays none
    bound = _PARTS_KL + _PARTS_SHARE * near
    note = f"mean KL divergence over {len(network)} positions beyond that of rung 4, nats"
    return ParityCheck(number, name, more, bound, note)


def _exact(number: int, name: str, truth: np.ndarray, found: np.ndarray) -> ParityCheck:
    measured = float(np.abs(truth - found).max())
    return ParityCheck(number, name, measured, _LOGIT_BOUND, "largest logit difference")


def _share(error: np.ndarray, bound: np.ndarray) -> float:
    """The largest error as a share of its bound; infinite where a bound of zero is missed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(error == 0, 0.0, error / bound)
    return float(shares.max(initial=0.0))
