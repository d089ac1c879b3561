"""Scores on tasks: which of several texts a model holds the likeliest.

The figures are those lm-evaluation-harness defines, on the same texts and tokens, so both give
the same. Knows items and likelihoods, nothing of files.

A context is computed once for all its continuations: between them the cache is cut back to it.
Text is cut into tokens as lm-evaluation-harness does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from edge_memllm.arrays import Logits
from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.engine.feeding import Feeder
from edge_memllm.engine.request import check_tokens, start_token
from edge_memllm.errors import RequestError
from edge_memllm.evaluation.perplexity import Predictor, exponential
from edge_memllm.evaluation.task_files import Item, Kind, Task
from edge_memllm.progress import Counted
from edge_memllm.sampling import next_token_losses
from edge_memllm.text.tokenization import Tokenizer

_CHUNK = 64  # positions whose logits are alive at once

_PERPLEXITY = "perplexity"
# Of each kind: what is averaged over the items.
_FIGURES: dict[Kind, tuple[str, ...]] = {
    "choices": ("acc", "acc_norm", "acc_bytes"),
    "contexts": ("acc",),
    "continuation": ("acc", _PERPLEXITY),
    "pairs": ("acc",),
}


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely one continuation is."""

    logprob: float  # nats, of all its tokens
    greedy: bool  # whether each token is the likeliest one
    truncated: bool  # whether the context was too long and lost its beginning


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A context (at least one token) and what follows it (at least one)."""

    context: list[int]
    continuation: list[int]


class PairEncoder:
    """Cuts (context, continuation) into tokens; the rules are those of lm-evaluation-harness.

    White space at the end of a context goes to the continuation. Both are tokenized as one text,
    and the tokens beyond those of the context alone are the continuation. An empty context is the
    token that starts a text.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = spec.vocab_size
        self._start = start_token(spec)
        # Whether the tokenizer itself puts the start in front, as those of the Llama family do.
        self._adds_start = self._encode("")[:1] == [self._start]

    def pair(self, context: str, continuation: str) -> TokenPair:
        """Return the tokens; raises `RequestError` where nothing is left to predict."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if kept:
            known = self.text(kept)
            found = TokenPair(known, self.text(kept + continuation)[len(known) :])
        else:
            found = self._first(self._encode(continuation, special=False))
        if not found.continuation:
            raise RequestError(
                f"{continuation!a:.80} behind {context[-40:]!a} gives no token to predict. "
                "Give a continuation that is not empty."
            )
        return found

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the tokenizer puts in front, but not twice."""
        tokens = self._encode(text)
        twice = self._adds_start and tokens[1:2] == [self._start]
        return tokens[1:] if twice else tokens

    @property
    def start(self) -> int:
        """The token that starts a text; raises `RequestError` if the model has none."""
        if self._start is None:
            raise RequestError(
                "A text without context cannot be scored: the model has no token that starts a "
                "text. Give a context."
            )
        return self._start

    def _first(self, tokens: list[int]) -> TokenPair:
        """What is predicted from the start of a text, which may be written out already."""
        if tokens[:1] == [self.start]:
            return TokenPair(tokens[:1], tokens[1:])
        return TokenPair([self.start], tokens)

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return check_tokens(self._tokenizer.encode(text, special=special), self._vocabulary)


class Scorer:
    """Scores continuations with one model. Use it as a context manager: it owns a cache."""

    def __init__(self, model: Predictor, memory_gain: Sequence[float] | None = None) -> None:
        """Take a model, which stays open; `memory_gain` [L] replaces its gains."""
        self.encoder = PairEncoder(model.tokenizer, model.manifest.model)
        self._most = model.manifest.model.max_position_embeddings
        chunk = max(_CHUNK, model.prefill_chunk)
        self._feeder = Feeder(model.runtime, model.source, 1, chunk, memory_gain=memory_gain)
        self._cut: int | None = None  # where the context in the cache begins
        self._logits: tuple[Sequence[int], Logits] | None = None  # of the last step, by what it fed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._feeder.__exit__(*error)

    def score_texts(self, context: str, continuations: Sequence[str]) -> list[Likelihood]:
        """Return the likelihood of each text behind one context; see `PairEncoder` and `score`."""
        pairs = [self.encoder.pair(context, each) for each in continuations]
        return self.score(pairs[0].context, [pair.continuation for pair in pairs])

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[Likelihood]:
        """Return the likelihood of each continuation of one context, all of at least one token.

        A context that leaves no room for a continuation loses its beginning. Raises
        `RequestError` for a continuation that does not fit by itself.
        """
        self._cut = self._logits = None
        return [self._score(context, each) for each in continuations]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        if len(continuation) > self._most:
            raise RequestError(
                f"A continuation has {len(continuation)} tokens and the model's context holds "
                f"{self._most}. Leave the item out, or shorten it."
            )
        # The last token is predicted, not fed, so there is room for one more than the context.
        cut = max(0, len(context) + len(continuation) - self._most - 1)
        self._hold(context, cut)
        total, greedy, place = 0.0, True, 0
        for logits in self._steps([context[-1], *continuation[:-1]], context[cut:-1]):
            targets = continuation[place : place + len(logits)]
            total -= float(next_token_losses(logits, targets).sum())
            greedy = greedy and bool((logits.argmax(axis=1) == np.asarray(targets)).all())
            place += len(targets)
        return Likelihood(total, greedy, cut > 0)

    def _hold(self, context: Sequence[int], cut: int) -> None:
        """Have all of context[cut:] but its last token in the cache."""
        if cut != self._cut:
            self._feeder.cache.truncate(0, 0)
            self._feeder.skip(0, context[cut:-1])
            self._feeder.cache.mark(0)
            self._cut, self._logits = cut, None

    def _steps(self, tokens: Sequence[int], held: Sequence[int]) -> Iterator[Logits]:
        """Yield the logits behind each token, a chunk at a time; the same tokens cost nothing."""
        if self._logits is not None and self._logits[0] == tokens:
            yield self._logits[1]
            return
        self._feeder.rewind(0, held)
        for begin in range(0, len(tokens), _CHUNK):
            logits = self._feeder.score(0, tokens[begin : begin + _CHUNK])
            self._logits = (tokens, logits) if len(tokens) <= _CHUNK else None
            yield logits


@dataclass(frozen=True, slots=True)
class Score:
    """A figure and its standard error, None where there is a single item."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model scored on one task, or on a group of tasks."""

    name: str
    kind: str  # of the task's items, or "mixed"
    items: int
    truncated: int  # texts whose context was too long and lost its beginning
    scores: dict[str, Score]
    group: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a dict for JSON: `acc` and `acc_stderr`, and so on."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "items": self.items,
            "truncated": self.truncated,
        }
        for name, score in self.scores.items():
            found |= {name: score.value, f"{name}_stderr": score.stderr}
        return found


def measure_task(
    model: Predictor,
    task: Task,
    progress: Counted | None = None,
    *,
    memory_gain: Sequence[float] | None = None,
) -> TaskResult:
    """Score all items of a task, one after the other; each result depends on its item alone.

    `memory_gain` [L] replaces the model's gains, `progress(done, total)` is called with items.
    Raises `RequestError` for an item that does not fit the model, naming the task and the item.
    """
    rows: list[list[float]] = []
    truncated = 0
    with Scorer(model, memory_gain) as scorer:
        for number, item in enumerate(task.items, 1):
            try:
                found = _likelihoods(scorer, item)
            except RequestError as error:
                raise RequestError(f"{task.name}, item {number}: {error}") from None
            truncated += sum(each.truncated for each in found)
            rows.append(_outcome(task.kind, item, found))
            if progress is not None:
                progress(number, len(task.items))
    scores = {
        name: _score(name, column)
        for name, column in zip(_FIGURES[task.kind], zip(*rows, strict=True), strict=True)
    }
    return TaskResult(task.name, task.kind, len(rows), truncated, scores, task.group)


def mean_result(name: str, results: Sequence[TaskResult]) -> TaskResult:
    """Return the mean accuracies of several tasks, each counting the same whatever its size.

    Of the accuracies, those that all of them have. Perplexities are not averaged.
    """
    common = [
        figure
        for figure in results[0].scores
        if figure != _PERPLEXITY and all(figure in result.scores for result in results)
    ]
    kinds = {result.kind for result in results}
    scores = {figure: _mean([result.scores[figure] for result in results]) for figure in common}
    return TaskResult(
        name=name,
        kind=kinds.pop() if len(kinds) == 1 else "mixed",
        items=sum(result.items for result in results),
        truncated=sum(result.truncated for result in results),
        scores=scores,
    )


def _likelihoods(scorer: Scorer, item: Item) -> list[Likelihood]:
    return [
        found
        for context in item.contexts
        for found in scorer.score_texts(context, item.continuations)
    ]


def _outcome(kind: Kind, item: Item, found: Sequence[Likelihood]) -> list[float]:
    """Return the item's part in each figure of its kind; perplexity is averaged as nats."""
    logprobs = np.array([each.logprob for each in found])
    if kind == "continuation":
        return [float(found[0].greedy), -float(logprobs[0])]
    if kind != "choices":
        return [_right(logprobs, item)]
    texts = item.continuations
    characters = np.array([len(text) for text in texts], np.float64)
    sizes = np.array([len(text.encode()) for text in texts], np.float64)
    return [_right(each, item) for each in (logprobs, logprobs / characters, logprobs / sizes)]


def _right(values: np.ndarray[Any, Any], item: Item) -> float:
    return float(int(values.argmax()) == item.answer)


def _score(name: str, values: Sequence[float]) -> Score:
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values)
    stderr = math.sqrt(variance / (count - 1) / count) if count > 1 else None
    if name != _PERPLEXITY:
        return Score(mean, stderr)
    # To first order: the exponential carries a small error of its argument as a factor.
    perplexity = exponential(mean)
    return Score(perplexity, None if stderr is None else perplexity * stderr)


def _mean(scores: Sequence[Score]) -> Score:
    """The mean of independent figures."""
    value = math.fsum(score.value for score in scores) / len(scores)
    errors = [score.stderr for score in scores if score.stderr is not None]
    if len(errors) < len(scores):
        return Score(value, None)
    return Score(value, math.sqrt(math.fsum(error**2 for error in errors)) / len(scores))
