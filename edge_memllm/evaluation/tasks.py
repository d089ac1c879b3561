"""Scores on tasks: which of several texts a model holds the likeliest.

The figures are those lm-evaluation-harness defines, on the same texts and tokens, so both give
the same. Knows items and likelihoods, nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_memllm.errors import RequestError
from edge_memllm.evaluation.items import Item, Kind
from edge_memllm.evaluation.likelihood import Likelihood, Scorer
from edge_memllm.evaluation.task_files import Task
from edge_memllm.perplexity import exponential
from edge_memllm.predictor import Predictor

_PERPLEXITY = "perplexity"
# Of each kind: what is averaged over the items.
_FIGURES: dict[Kind, tuple[str, ...]] = {
    "choices": ("acc", "acc_norm", "acc_bytes"),
    "contexts": ("acc",),
    "continuation": ("acc", _PERPLEXITY),
    "pairs": ("acc",),
}


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
    model: Predictor, task: Task, progress: Callable[[int, int], None] | None = None
) -> TaskResult:
    """Score all items of a task, one after the other; each result depends on its item alone.

    `progress(done, total)` is called with items. Raises `RequestError` for an item that does not
    fit the model, naming the task and the item.
    """
    rows: list[list[float]] = []
    truncated = 0
    with Scorer(model) as scorer:
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
