"""One call for all analyses: questions about a model in, an `Explanation` out.

Knows which analysis answers what, and what each needs; computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edge_memllm.errors import RequestError
from edge_memllm.interpretation.features import check_layers
from edge_memllm.interpretation.findings import Explanation, KeyCard, Sentence, TokenCard
from edge_memllm.interpretation.keys import key_cards, token_cards
from edge_memllm.interpretation.sentences import measure_sentence
from edge_memllm.interpretation.similarity import similar_tokens
from edge_memllm.perplexity import text_tokens

if TYPE_CHECKING:
    from edge_memllm.evaluation import Task
    from edge_memllm.interpretation.findings import LayerClusters, LayerCurves, SimilarTokens
    from edge_memllm.interpretation.subject import Subject

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What one wants to know. Words are found by `TokenTexts.find`, keys are (layer, key).

    `layers` are those of token cards, similar tokens, clusters and curves; None takes all of them.
    A card shows its `strongest` keys, and lists of tokens are `count` long. `cluster_count` None
    lets each layer choose. `corpus` is a text that curves and clusters are measured on, `tasks`
    what the sweep of gains is scored on.
    """

    texts: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    keys: tuple[tuple[int, int], ...] = ()
    similar: tuple[str, ...] = ()
    clusters: bool = False
    cluster_count: int | None = None
    curves: bool = False
    corpus: str | None = None
    tasks: tuple[Task, ...] = ()
    layers: tuple[int, ...] | None = None
    strongest: int = 4
    count: int = 8
    seed: int = 0

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
    has no keys, and neither have rows that no FFN-M makes.
    """
    asked = _Asked(subject, questions, progress)
    return Explanation(
        model=subject.facts,
        command=command,
        tokens=asked.token_cards(),
        keys=asked.key_cards(),
        similar=asked.similar(),
        sentences=tuple(map(asked.sentence, questions.texts)),
        clusters=asked.clusters(),
        curves=asked.curves(),
    )


class _Asked:
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
            subject.predictor.table,
            self._fed[text],
            subject.texts,
            text=text,
            gain=np.array(subject.facts.memory_gain, np.float32),
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
    from edge_memllm.interpretation.decomposition import direct_parts

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
