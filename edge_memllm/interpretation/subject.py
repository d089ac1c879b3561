"""What is looked at: a checkpoint or an artifact, opened so that all analyses can work on either.

A composition root: it may name the outer layers, and imports them only when called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.artifact import Artifact
from edge_memllm.errors import ArtifactError, missing_extra
from edge_memllm.interpretation.features import TableMemory
from edge_memllm.interpretation.findings import ModelFacts
from edge_memllm.interpretation.head import Head
from edge_memllm.interpretation.memory import Memory
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.manifest import MANIFEST_NAME, ModelSpec
from edge_memllm.predictor import Predictor

if TYPE_CHECKING:
    from edge_memllm.interpretation.network_memory import NetworkMemory


@dataclass(frozen=True)
class Subject:
    """An opened model. `network` is the memory again where it is a checkpoint's, else None."""

    facts: ModelFacts
    predictor: Predictor
    memory: Memory
    head: Head
    texts: TokenTexts
    network: NetworkMemory | None


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
    head = GraphHead(artifact)
    opened.callback(head.close)
    model = opened.enter_context(load(path, device="cpu", threads=threads))
    memory = TableMemory(model)
    return _subject(path, "artifact", model, memory, head.head, None)


def _open_checkpoint(path: Path, threads: int | None, opened: ExitStack) -> Subject:
    try:
        import torch

        from edge_memllm.interpretation.checkpoint_model import open_checkpoint
        from edge_memllm.modeling.threads import keep_to_quota
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    opened.callback(torch.set_num_threads, torch.get_num_threads())
    if threads is None:
        keep_to_quota()
    else:
        torch.set_num_threads(threads)
    model = open_checkpoint(path)
    _refuse_dense(path, model.manifest.model)
    memory = model.memory
    return _subject(path, "checkpoint", model, memory, memory.head, memory)


def _subject(
    path: Path,
    source: str,
    model: Predictor,
    memory: Memory,
    head: Head,
    network: NetworkMemory | None,
) -> Subject:
    spec = model.manifest.model
    facts = ModelFacts(
        name=path.resolve().name,
        source=source,
        identity=spec.identity,
        beta=spec.beta,
        layers=spec.num_hidden_layers,
        memory_layers=spec.memory_layers,
        width=spec.hidden_size,
        vocabulary=spec.vocab_size,
        keys=memory.keys,
        memory_gain=spec.memory_gain,
    )
    texts = TokenTexts(model.tokenizer, spec.vocab_size)
    return Subject(facts, model, memory, head, texts, network)


def _refuse_dense(path: Path, model: ModelSpec) -> None:
    if not model.memory_layers:
        raise ArtifactError(
            f"{path}: this model is dense (beta 8): it has no memory to explain. Give one with a "
            "smaller beta."
        )
