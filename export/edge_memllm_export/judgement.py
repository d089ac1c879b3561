"""An artifact against its checkpoint: first whether it computes the same, then what it lost.

The first is the parity ladder:

    1  codec        rows -> bytes -> rows stays within the codec's bound
    2  table        rows and embeddings of the table are the network's
    3  feeding      the network fed with rows computes what it computes without
    4  graph        the graph computes what the network computes from the table's rows
    5  cache        one token at a time gives what the whole sequence gives
    6  chunks       prefill in chunks gives what prefill in one go gives

The first red rung names the fault: each relies only on those before it. What codes of few bits
lose is measured on a text, as divergence and perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import TableLayout
from edge_memllm.codecs import Codec
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError, ExportError
from edge_memllm.evaluation.perplexity import divergences, exponential
from edge_memllm.progress import Counted
from edge_memllm.sampling import next_token_losses
from edge_memllm.table.table import Table
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export.texts import judging_text
from edge_memllm_runtimes import open_runtime

if TYPE_CHECKING:
    from edge_memllm_export.architectures.architecture import Reference

_SPREAD_TOKENS = 64
_SEQUENCE = 48
_ODD_CHUNK = 7
_LOGIT_BOUND = 1e-4  # two float32 computations of the same logits, summed in different orders
# Rows computed in other chunks than here, as a part of the largest value of their layer.
_ROW_SLACK = {"float32": 1e-5, "bfloat16": 0.03}
# Mean KL, nats. What quantisation costs is measured on a text; here a wrong wire must
# show, which costs whole nats, also on networks with random weights.
_GRAPH_KL_BOUNDS = {"int4": 0.5, "mixed": 0.5, "int8": 0.02, "fp16": 1e-3}
_SAME_GRAPH_KL_BOUND = 1e-3

# An export beyond either bound is refused unless the loss is accepted. 8-bit forms stay far
# below both; the paper's 4-bit table costs 0.4 % of perplexity (Table 7), and careful 4-bit
# matrices a few per cent. More than 5 % (0.05 nat) is what going down a model size costs.
MAX_PERPLEXITY_INCREASE = 0.05
MAX_MEAN_KL = 0.05

_WINDOW = 256
_CHUNK = 32  # positions whose logits are alive at once
_MOST_TOKENS = 4096
_FEWEST_TOKENS = 512
# A floor against texts that are next to nothing, not a measured one: the text that comes along
# has thousands of tokens.
LEAST_TOKENS = 128
# Tokens times parameters: about two minutes of one modern core, in both models together.
_TOKEN_PARAMETERS = 1 << 40


class JudgedArtifact:
    """The artifact's graph on the CPU, its table, and the judge; use it in a with-statement."""

    def __init__(self, path: Path, reference: Reference) -> None:
        self.reference = reference
        self.artifact = Artifact.open(path)
        try:
            self.table = Table.open(self.artifact, "pread")
            self._runtime = open_runtime(self.artifact, "cpu")
        except BaseException:
            self.artifact.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runtime.close()
        self.table.close()
        self.artifact.close()

    def graph_logits(self, ids: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """Logits float32 [<= chunk, V] of the graph, fed `chunk` tokens at a time."""
        with Feeder(self._runtime, self.table, 1, chunk) as feeder:
            for start in range(0, len(ids), chunk):
                yield np.array(feeder.score(0, ids[start : start + chunk]), np.float32)


def text_tokens(judged: JudgedArtifact, text: str, most: int) -> list[int]:
    """The first tokens of a text, at most `most`, by the artifact's own tokenizer.

    Raises ExportError when it gives tokens the model does not have.
    """
    ids = Tokenizer.from_artifact(judged.artifact).encode(text)[:most]
    vocabulary = judged.artifact.manifest.model.vocab_size
    if max(ids, default=0) >= vocabulary:
        raise ExportError(
            f"tokenizer.json gives token {max(ids)}, the model has {vocabulary}. "
            "The tokenizer is another model's; put the right one into the checkpoint."
        )
    return ids


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
    yield _graph(judged, sequence)
    whole = _graph_logits(judged, sequence, len(sequence))
    for number, name, chunk in ((5, "cache", 1), (6, "chunks", _ODD_CHUNK)):
        parts = _graph_logits(judged, sequence, chunk)
        yield _compared(judged, number, name, whole, parts, _SAME_GRAPH_KL_BOUND)


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
    half_unit = 2.0**-11 if layout.embedding_dtype == "float16" else 0.0
    embedding_bound = half_unit * np.maximum(np.abs(embedding), 2.0**-14)
    measured = max(
        _share(np.abs(judged.table.rows(ids) - rows), bound),
        _share(np.abs(judged.table.embeddings(ids) - embedding), embedding_bound),
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


def _graph(judged: JudgedArtifact, sequence: list[int]) -> ParityCheck:
    distinct = np.unique(sequence)
    table = judged.table
    network = judged.reference.fed_logits(
        sequence, table.embeddings(distinct), table.rows(distinct)
    )
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
) -> ParityCheck:
    """Logits of float32 graphs by their largest difference, of all others by KL divergence."""
    if judged.artifact.manifest.graph.weights == "fp32":
        measured = float(np.abs(truth - found).max())
        return ParityCheck(number, name, measured, _LOGIT_BOUND, "largest logit difference")
    note = f"mean KL divergence over {len(truth)} positions, nats"
    return ParityCheck(number, name, float(divergences(truth, found).mean()), kl_bound, note)


def _graph_logits(judged: JudgedArtifact, sequence: list[int], chunk: int) -> np.ndarray:
    return np.concatenate(list(judged.graph_logits(sequence, chunk)))


def _share(error: np.ndarray, bound: np.ndarray) -> float:
    """The largest error as a share of its bound; infinite where a bound of zero is missed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(error == 0, 0.0, error / bound)
    return float(shares.max(initial=0.0))


@dataclass(frozen=True)
class Quality:
    """How far the artifact is from its checkpoint on `tokens` predicted tokens of a text."""

    tokens: int
    mean_kl: float  # nats, checkpoint to artifact
    max_kl: float
    checkpoint_perplexity: float
    artifact_perplexity: float

    @property
    def perplexity_increase(self) -> float:
        """Relative change of perplexity; 0.01 is one per cent worse."""
        return self.artifact_perplexity / self.checkpoint_perplexity - 1

    @property
    def acceptable(self) -> bool:
        """Whether both bounds hold. A figure that is not a number does not."""
        return self.mean_kl <= MAX_MEAN_KL and self.perplexity_increase <= MAX_PERPLEXITY_INCREASE


def token_budget(parameters: int) -> int:
    """How many tokens a model of this size is compared on."""
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, _TOKEN_PARAMETERS // parameters))


def measure_quality(
    judged: JudgedArtifact, ids: list[int], progress: Counted | None = None
) -> Quality:
    """Compare the artifact with its checkpoint on the tokens `ids`, in windows of their own."""
    window = min(_WINDOW, judged.artifact.manifest.model.max_position_embeddings)
    parts: list[np.ndarray] = []
    for start in range(0, len(ids), window):
        parts += _window_figures(judged, ids[start : start + window])
        if progress is not None:
            progress(min(start + window, len(ids)), len(ids))
    divergence, truth_loss, found_loss = np.concatenate(parts, axis=1)
    return Quality(
        tokens=len(divergence),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        checkpoint_perplexity=exponential(float(truth_loss.mean())),
        artifact_perplexity=exponential(float(found_loss.mean())),
    )


def _window_figures(judged: JudgedArtifact, ids: list[int]) -> Iterator[np.ndarray]:
    """Yield [3, n]: divergence, loss of the checkpoint and of the artifact, at each position."""
    both = zip(judged.reference.logits(ids, _CHUNK), judged.graph_logits(ids, _CHUNK), strict=True)
    for start, (truth, found) in zip(range(1, len(ids), _CHUNK), both, strict=False):
        targets = ids[start : start + _CHUNK]  # the last position has none
        truth, found = truth[: len(targets)], found[: len(targets)]
        losses = (next_token_losses(logits, targets) for logits in (truth, found))
        yield np.stack([divergences(truth, found), *losses])
