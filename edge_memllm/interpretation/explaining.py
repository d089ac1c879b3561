"""One call for all analyses: questions about a model in, an `Explanation` out.

Knows which analysis answers what, and what each needs; computes nothing itself.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import MANIFEST_NAME, GraphSpec, Manifest, TableSpec
from edge_memllm.artifact.model_spec import MemorySpec, ModelSpec
from edge_memllm.artifact.producer import PRODUCER
from edge_memllm.errors import ArtifactError, RequestError, missing_extra
from edge_memllm.evaluation import Task
from edge_memllm.evaluation.perplexity import Predictor, text_tokens
from edge_memllm.interpretation.findings import (
    Explanation,
    KeyCard,
    ModelFacts,
    Sentence,
    TokenCard,
)
from edge_memllm.interpretation.gates import NO_PARTS, NO_READING, OFF, are_gates
from edge_memllm.interpretation.head import Head
from edge_memllm.interpretation.keys import key_cards, similar_tokens, token_cards
from edge_memllm.interpretation.memory import Memory, NetworkRecords, TableMemory, check_layers
from edge_memllm.interpretation.texts import measure_sentence
from edge_memllm.options import Option, layer_list, positive_int
from edge_memllm.progress import Progress
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Tokenizer

if TYPE_CHECKING:
    from edge_memllm.interpretation.findings import LayerClusters, LayerCurves, SimilarTokens
    from edge_memllm.interpretation.network import NetworkMemory


_OPSET = 0  # of no graph
_ARTIFACT, _CHECKPOINT = "artifact", "checkpoint"
_QUESTIONS, _LIMITS = "questions", "how much"  # headings of the command line


def key_of_layer(text: str) -> tuple[int, int]:
    """Parse a layer and a key, as ``0:443``."""
    layer, separator, key = text.partition(":")
    if not (separator and layer.isdecimal() and key.isdecimal()):
        raise ArgumentTypeError(f"{text!r} is no key of a layer, such as 0:443")
    return int(layer), int(key)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What one wants to know. Words are found by `TokenTexts.find`, keys are (layer, key).

    `layers` are those of token cards, similar tokens, clusters and curves; None takes all of them.
    A card shows its `strongest` keys, and lists of tokens are `count` long. `cluster_count` None
    lets each layer choose. `corpus` is a text that curves and clusters are measured on, `tasks`
    what the sweep of gains is scored on.
    """

    texts: Annotated[
        tuple[str, ...],
        Option(
            "where in this text memory matters, token by token; may be given several times, as the "
            "next three",
            metavar="TEXT",
            parse=str,
            several="repeated",
            flag="--text",
            group=_QUESTIONS,
        ),
    ] = ()
    tokens: Annotated[
        tuple[str, ...],
        Option(
            "what a token's memory does, and the keys that make it up",
            metavar="WORD",
            parse=str,
            several="repeated",
            flag="--token",
            group=_QUESTIONS,
        ),
    ] = ()
    keys: Annotated[
        tuple[tuple[int, int], ...],
        Option(
            "which tokens fire a key, and what its value does",
            metavar="LAYER:KEY",
            parse=key_of_layer,
            several="repeated",
            flag="--key",
            group=_QUESTIONS,
        ),
    ] = ()
    similar: Annotated[
        tuple[str, ...],
        Option(
            "tokens whose memory is the most like this one's",
            metavar="WORD",
            parse=str,
            several="repeated",
            group=_QUESTIONS,
        ),
    ] = ()
    clusters: Annotated[
        bool,
        Option(
            "K-means clusters of the vocabulary in each layer, labelled and judged against "
            "shuffled labels (needs the explain extra)",
            group=_QUESTIONS,
        ),
    ] = False
    curves: Annotated[
        bool,
        Option(
            "how the layers differ; with --corpus also what each one's memory is worth",
            flag="--layer-curves",
            group=_QUESTIONS,
        ),
    ] = False
    layers: Annotated[
        tuple[int, ...] | None,
        Option(
            "of tokens, similar tokens, clusters and curves",
            metavar="LAYER[,...]",
            parse=layer_list,
            several="list",
            unset="all",
            group=_LIMITS,
            needs=("--token", "--similar", "--clusters", "--layer-curves"),
        ),
    ] = None
    strongest: Annotated[
        int,
        Option(
            "show so many keys of a token in each layer",
            parse=positive_int,
            flag="--keys",
            group=_LIMITS,
            needs=("--token",),
        ),
    ] = 4
    count: Annotated[
        int,
        Option(
            "tokens in each list",
            parse=positive_int,
            group=_LIMITS,
            needs=("--token", "--key", "--similar"),
        ),
    ] = 8
    cluster_count: Annotated[
        int | None,
        Option(
            "so many clusters in each layer",
            metavar="K",
            parse=positive_int,
            unset="each layer chooses",
            group=_LIMITS,
            needs=("--clusters",),
        ),
    ] = None
    corpus: Annotated[
        str | None,
        Option(
            "text for clusters (how frequent tokens are) and curves (what layers are worth)",
            reads_text=True,
            group=_LIMITS,
            needs=("--clusters", "--layer-curves"),
        ),
    ] = None
    seed: Annotated[
        int,
        Option(
            "of samples, clusters and shuffles",
            group=_LIMITS,
            needs=("--clusters", "--layer-curves"),
        ),
    ] = 0
    tasks: tuple[Task, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether anything is asked at all."""
        lists = (self.texts, self.tokens, self.keys, self.similar)
        return any(lists) or self.clusters or self.curves


def explain(
    subject: Subject,
    questions: Questions,
    *,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> Explanation:
    """Answer all questions about an opened model; `command` is noted as what asked them.

    Raises `RequestError` for what is not there, and for what the model cannot answer: an artifact
    has no keys, and neither have rows that no FFN-M makes. What rows that are gates do not answer
    beside what they do, is left out and said in the notes.
    """
    answers = _Answers(subject, questions, progress)
    return Explanation(
        model=subject.facts,
        command=command,
        notes=tuple(_notes(subject, questions)),
        tokens=answers.token_cards(),
        keys=answers.key_cards(),
        similar=answers.similar(),
        sentences=tuple(map(answers.sentence, questions.texts)),
        clusters=answers.clusters(),
        curves=answers.curves(),
    )


def _notes(subject: Subject, questions: Questions) -> Iterator[str]:
    """What is to be said of rows that are gates, as far as it was asked for."""
    if not are_gates(subject.memory_spec):
        return
    if questions.texts or questions.curves:
        yield OFF
    if questions.texts and subject.facts.source == _CHECKPOINT:
        yield NO_PARTS
    if questions.tokens:
        yield NO_READING


class _Answers:
    """The questions with all names resolved, so that a wrong one is said before any work."""

    def __init__(self, subject: Subject, questions: Questions, progress: Progress) -> None:
        if not questions.anything:
            raise RequestError("There is nothing to explain. Ask for a text, a token or a key.")
        memory, find = subject.memory, subject.texts.find
        self._subject, self._questions, self._progress = subject, questions, progress
        self._layers = questions.layers or tuple(range(memory.layers))
        check_layers(self._layers, memory.layers)
        self._tokens = list(dict.fromkeys(map(find, questions.tokens)))
        self._like = list(dict.fromkeys(map(find, questions.similar)))
        self._fed = {text: _fed(subject, text) for text in questions.texts}
        if questions.keys and memory.keys is None:
            memory.values(0)  # refuses, and says why there are no keys

    def token_cards(self) -> tuple[TokenCard, ...]:
        if not self._tokens:
            return ()
        return token_cards(
            self._subject.memory,
            self._subject.head,
            self._tokens,
            self._subject.texts,
            layers=self._layers,
            keys=self._questions.strongest,
            count=self._questions.count,
            progress=self._progress,
        )

    def key_cards(self) -> tuple[KeyCard, ...]:
        cards = key_cards(
            self._subject.memory,
            self._subject.head,
            self._questions.keys,
            self._subject.texts,
            count=self._questions.count,
            progress=self._progress,
        )
        return tuple(cards.values())

    def similar(self) -> tuple[SimilarTokens, ...]:
        if not self._like:
            return ()
        return similar_tokens(
            self._subject.memory,
            self._like,
            texts=self._subject.texts,
            layers=self._layers,
            count=self._questions.count,
            progress=self._progress,
        )

    def sentence(self, text: str) -> Sentence:
        subject = self._subject
        found = measure_sentence(
            subject.predictor.runtime,
            subject.predictor.source,
            self._fed[text],
            subject.texts,
            text=text,
            memory=subject.memory_spec,
            progress=self._progress,
        )
        return found if subject.network is None else _with_parts(found, subject)

    def clusters(self) -> tuple[LayerClusters, ...]:
        if not self._questions.clusters:
            return ()
        from edge_memllm.interpretation.clusters import cluster_layers

        return cluster_layers(
            self._subject.memory,
            texts=self._subject.texts,
            layers=self._layers,
            progress=self._progress,
            clusters=self._questions.cluster_count,
            corpus=self._questions.corpus,
            seed=self._questions.seed,
        )

    def curves(self) -> LayerCurves | None:
        if not self._questions.curves:
            return None
        from edge_memllm.interpretation.curves import layer_curves

        return layer_curves(
            self._subject.memory,
            layers=self._layers,
            progress=self._progress,
            model=self._subject.predictor,
            corpus=self._questions.corpus,
            tasks=self._questions.tasks,
            seed=self._questions.seed,
        )


def _with_parts(sentence: Sentence, subject: Subject) -> Sentence:
    """Add the direct parts of the logits, which need the network."""
    from edge_memllm.interpretation.network import direct_parts

    assert subject.network is not None
    ids, targets = (
        np.array([token.id for token in tokens], np.int64)
        for tokens in (sentence.tokens, sentence.targets)
    )
    return replace(sentence, direct=direct_parts(subject.network, ids, targets))


def _fed(subject: Subject, text: str) -> list[int]:
    """Return a text as it is fed, behind the token that starts a text, if the model has one."""
    fed = list(text_tokens(subject.predictor, text).fed)
    context = subject.predictor.manifest.model.max_position_embeddings
    if len(fed) > context:
        raise RequestError(
            f"the text has {len(fed)} tokens and the model's context holds {context}. Give a "
            "shorter text."
        )
    return fed


@dataclass(frozen=True)
class Subject:
    """An opened model. `network` is the memory again where a checkpoint has keys, else None."""

    facts: ModelFacts
    predictor: Predictor
    memory: Memory
    head: Head | None  # None for gates, which are no vectors of the stream
    texts: TokenTexts
    network: NetworkMemory | None

    @property
    def memory_spec(self) -> MemorySpec:
        """How the memory enters the network."""
        return self.predictor.manifest.model.memory


@contextmanager
def open_subject(path: Path, threads: int | None = None) -> Iterator[Subject]:
    """Open the folder of a checkpoint or an artifact, on the CPU, and close it in the end.

    `threads` of an artifact's graph, or of torch. Raises what `edge_memllm.load` or the export's
    reading of a checkpoint raises, and `ArtifactError` for a dense model.
    """
    with ExitStack() as opened:
        whole = (path / MANIFEST_NAME).exists() or not path.is_dir()
        opener = _open_artifact if whole else _open_checkpoint
        yield opener(path, threads, opened)


def _open_artifact(path: Path, threads: int | None, opened: ExitStack) -> Subject:
    from edge_memllm.loading import load
    from edge_memllm_runtimes.graph_head import GraphHead

    artifact = opened.enter_context(Artifact.open(path))
    _refuse_dense(path, artifact.manifest.model)
    head = None
    if not are_gates(artifact.manifest.model.memory):
        reader = GraphHead(artifact)
        opened.callback(reader.close)
        head = reader.head
    model = opened.enter_context(load(path, device="cpu", threads=threads))
    return _subject(path, _ARTIFACT, model, TableMemory(model), head, None)


def _open_checkpoint(path: Path, threads: int | None, opened: ExitStack) -> Subject:
    try:
        import torch

        from edge_memllm.modeling.training import keep_to_quota
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    opened.callback(torch.set_num_threads, torch.get_num_threads())
    if threads is None:
        keep_to_quota()
    else:
        torch.set_num_threads(threads)
    model = open_checkpoint(path)
    _refuse_dense(path, model.manifest.model)
    network = model.network
    if network is None:
        return _subject(path, _CHECKPOINT, model, TableMemory(model), None, None)
    return _subject(path, _CHECKPOINT, model, network, network.head, network)


def _subject(
    path: Path,
    source: str,
    model: Predictor,
    memory: Memory,
    head: Head | None,
    network: NetworkMemory | None,
) -> Subject:
    spec = model.manifest.model
    facts = ModelFacts(
        name=path.resolve().name,
        source=source,
        identity=spec.identity,
        beta=_beta(spec),
        layers=spec.num_hidden_layers,
        memory_layers=spec.memory.layers,
        width=spec.hidden_size,
        vocabulary=spec.vocab_size,
        keys=memory.keys,
        memory_gain=spec.memory.gain,
        memory_kind=spec.memory.kind,
    )
    texts = TokenTexts(model.tokenizer, spec.vocab_size)
    return Subject(facts, model, memory, head, texts, network)


def _beta(model: ModelSpec) -> int | None:
    """What the family says of itself, if it is the one that has it."""
    beta = model.details.get("beta")
    return beta if isinstance(beta, int) else None


def _refuse_dense(path: Path, model: ModelSpec) -> None:
    if not model.memory.layers:
        raise ArtifactError(
            f"{path}: this model has no token memory (dense): there is none to explain. Give a "
            "model that has one."
        )


@dataclass(frozen=True)
class CheckpointModel:
    """See `edge_memllm.evaluation.perplexity.Predictor`; its manifest names no files."""

    manifest: Manifest
    runtime: Runtime
    source: NetworkRecords
    tokenizer: Tokenizer
    network: NetworkMemory | None  # None for rows that are gates
    prefill_chunk: int = 256


def open_checkpoint(path: Path) -> CheckpointModel:
    """Open the folder of a checkpoint that has a tokenizer; its weights stay mapped.

    Raises `ArtifactError` without a tokenizer and for a dense model, `ExportError` for a checkpoint
    that cannot be read.
    """
    import torch

    from edge_memllm.interpretation.network import NetworkMemory
    from edge_memllm_export.checkpoint import Checkpoint
    from edge_memllm_runtimes.torch_reference import TorchReference

    source = Checkpoint.open(path)
    if not (path / TOKENIZER_FILE).is_file():
        raise ArtifactError(
            f"{path}: no {TOKENIZER_FILE}, so tokens have no text. Put the tokenizer there."
        )
    spec, reference = source.spec, source.architecture.reference()
    network, runtime = None, reference.runtime()
    if not are_gates(spec.memory):
        network = NetworkMemory(reference.network)
        runtime = TorchReference(reference.network, torch.float32)
    records = NetworkRecords(reference.rows(), spec.memory, spec.hidden_size)
    return CheckpointModel(
        manifest=_manifest(replace(spec, identity=source.identity()), records),
        runtime=runtime,
        source=records,
        tokenizer=Tokenizer((path / TOKENIZER_FILE).read_bytes()),
        network=network,
    )


def _manifest(model: ModelSpec, records: NetworkRecords) -> Manifest:
    """That of the artifact which would store nothing coarser than it is computed."""
    layout = records.layout
    table = TableSpec(
        file="",
        codec=layout.codec_id,
        embedding_dtype=layout.embedding_dtype,
        embedding_codec=layout.embedding.codec.id,
        record_bytes=layout.record_bytes,
        stride=layout.stride,
        alignment=layout.alignment,
        records_offset=0,
        checksums_sha256="",
        parameters_sha256=None,
        classes=None,
    )
    wire = layout.wire
    graph = GraphSpec("", None, "fp32", "float32", "float32", wire, _OPSET)
    return Manifest(model, table, graph, {}, PRODUCER)
