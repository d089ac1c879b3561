"""How much each layer's memory matters for what a model predicts, and how much of it is needed.

On windows spread over a text: the divergence with one layer's memory off, and perplexity and
scores with all memory scaled down (the paper's alpha). Works over any runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.evaluation import Task, mean_result, measure_task
from edge_memllm.evaluation.divergence import divergences
from edge_memllm.feeding import Logits
from edge_memllm.interpretation.findings import GainGroup
from edge_memllm.interpretation.gained_runtime import scaled_memory
from edge_memllm.mixed_precision.sensitivity import sample_windows
from edge_memllm.perplexity import exponential, next_token_losses, predictions, text_tokens
from edge_memllm.predictor import Predictor

Progress = Callable[[int, int], None]
Window = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Effect:
    """What changed gains do to the predictions of a text, in nats per token."""

    divergence: float  # mean KL divergence of the model's predictions from the changed ones
    loss: float  # mean negative log-likelihood with the change

    @property
    def perplexity(self) -> float:
        """Of the text, with the change."""
        return exponential(self.loss)


def gain_effects(
    model: Predictor,
    text: str,
    factors: Sequence[Sequence[float]],
    progress: Progress = lambda done, total: None,
) -> list[Effect]:
    """Return what each of `factors`, one number per layer, does on windows spread over a text.

    At most 2,048 tokens are predicted, of large models 512: each from those before it in its
    window. Raises `RequestError` for a text with nothing to predict, and as `scaled_memory`.
    """
    spec = model.manifest.model
    tokens = np.asarray(text_tokens(model, text).fed, np.int64)
    windows = sample_windows(
        tokens, spec.vocab_size, model.table.layout, spec.max_position_embeddings
    )
    changed = [scaled_memory(model, each) for each in factors]
    sums, count = np.zeros((len(factors), 2)), 0
    for number, window in enumerate(windows):
        truth = [(logits.copy(), targets) for logits, targets in _predicted(model, window)]
        count += len(window) - 1
        for place, other in enumerate(changed):
            for (right, targets), (logits, _) in zip(truth, _predicted(other, window), strict=True):
                sums[place, 0] += divergences(right, logits).sum()
                sums[place, 1] += next_token_losses(logits, targets).sum()
            progress(number * len(changed) + place + 1, len(windows) * len(changed))
    return [Effect(*each) for each in (sums / count).tolist()]


def task_sweep(
    model: Predictor,
    tasks: Sequence[Task],
    gains: Sequence[float],
    progress: Progress = lambda done, total: None,
) -> tuple[GainGroup, ...]:
    """Return how well a model does on each group of tasks at each of the gains.

    A task's group is the folder it was read from, otherwise the task itself; a group's figure is
    the mean accuracy of its tasks.
    """
    layers = model.manifest.model.num_hidden_layers
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group or task.name, []).append(task)
    figures: dict[str, list[float]] = {name: [] for name in groups}
    for number, gain in enumerate(gains):
        scaled = scaled_memory(model, [gain] * layers)
        for place, (name, members) in enumerate(groups.items(), 1):
            result = mean_result(name, [measure_task(scaled, each) for each in members])
            figures[name].append(result.scores["acc"].value)
            progress(number * len(groups) + place, len(gains) * len(groups))
    return tuple(GainGroup(name, "accuracy", tuple(each)) for name, each in figures.items())


def _predicted(model: Predictor, window: Window) -> Iterator[tuple[Logits, Sequence[int]]]:
    tokens: list[int] = window.tolist()
    return predictions(model.runtime, model.table, tokens, context=len(tokens), stride=len(tokens))
