"""What a suppression does to a text: to the words, and to everything else.

The model as it is and its changed versions are fed the same tokens in the same windows, each
once. Works over any runtime and any source of records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Doubles, Ids, Logits
from edge_memllm.evaluation.perplexity import divergences, exponential, predictions
from edge_memllm.interpretation.findings import Finding
from edge_memllm.progress import Progress
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import next_token_losses
from edge_memllm.table.source import RecordSource


@dataclass(frozen=True, slots=True)
class WordFigures(Finding):
    """How one model predicts a text, the words' tokens and the others apart.

    `probability`, `log_probability` (nats) and `rank` (1 is the likeliest; the median) are those
    of the words' tokens where they came, None where they never do. `mass` is the probability of
    all of them together, mean over every position. `perplexity_elsewhere` is that of the tokens
    that are none of the words'; `perplexity_of_others` the same as if the words could not come,
    which what they lose does not flatter.
    """

    probability: float | None
    log_probability: float | None
    rank: float | None
    mass: float
    perplexity_elsewhere: float
    perplexity_of_others: float


@dataclass(frozen=True, slots=True)
class SuppressionEffect(Finding):
    """A changed model against the model as it is, on a text.

    `tokens` were predicted, `occurrences` of them are the words'. `divergence` is the mean KL
    divergence in nats of the predictions of all other tokens, as if the words could not come.
    """

    tokens: int
    occurrences: int
    before: WordFigures
    after: WordFigures
    divergence: float


def measure_suppression(
    runtime: Runtime,
    before: RecordSource,
    afters: Sequence[RecordSource],
    texts: Sequence[Sequence[int]],
    words: Ids,
    *,
    context: int,
    stride: int,
    progress: Progress = lambda *_: None,
) -> list[SuppressionEffect]:
    """Measure what the records `afters` do in place of `before`, on texts together.

    `texts` are as they are fed (`perplexity.TextTokens`), `words` the ids of the words' tokens.
    Windows are those of `perplexity.token_losses`. Keeps some 30 bytes a token for each.
    """
    total = sum(len(fed) - 1 for fed in texts)
    hits: list[NDArray[np.bool_]] = []
    sides: list[list[Doubles]] = [[] for _ in (before, *afters)]
    apart: list[list[Doubles]] = [[] for _ in afters]
    done = 0
    for fed in texts:
        every = [
            predictions(runtime, each, fed, context=context, stride=stride)
            for each in (before, *afters)
        ]
        for chunk in zip(*every, strict=True):
            targets = np.asarray(chunk[0][1], np.int64)
            truth = chunk[0][0]
            hits.append(np.isin(targets, words))
            for side, (logits, _) in zip(sides, chunk, strict=True):
                side.append(_figures(logits, targets, words))
            for found, (logits, _) in zip(apart, chunk[1:], strict=True):
                found.append(_divergence_of_others(truth, logits, words))
            done += len(targets)
            progress("text", done, total)
    hit = np.concatenate(hits)
    figures = [_summed(np.concatenate(side, axis=1), hit) for side in sides]
    return [
        SuppressionEffect(
            len(hit), int(hit.sum()), figures[0], after, float(np.concatenate(kl).mean())
        )
        for after, kl in zip(figures[1:], apart, strict=True)
    ]


def _figures(logits: Logits, targets: Ids, words: Ids) -> Doubles:
    """[3, T] of one model: loss of the target, its rank, probability of all words."""
    losses = next_token_losses(logits, targets.tolist())
    own = np.take_along_axis(logits, targets[:, None], axis=1)
    ranks = 1.0 + (logits > own).sum(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    exact = np.exp(shifted, dtype=np.float64)
    mass = exact[:, words].sum(axis=1) / exact.sum(axis=1)
    return np.stack([losses, ranks, mass])


def _divergence_of_others(truth: Logits, found: Logits, words: Ids) -> Doubles:
    """KL divergence [T] of the predictions without the words."""
    return divergences(*(np.delete(each, words, axis=1) for each in (truth, found)))


def _summed(figures: Doubles, hit: NDArray[np.bool_]) -> WordFigures:
    losses, ranks, mass = figures
    at = losses[hit]
    elsewhere = losses[~hit]
    # Of the probability that the words leave, instead of all of it.
    others = elsewhere + np.log1p(-mass[~hit])
    return WordFigures(
        probability=float(np.exp(-at).mean()) if at.size else None,
        log_probability=float(-at.mean()) if at.size else None,
        rank=float(np.median(ranks[hit])) if at.size else None,
        mass=float(mass.mean()),
        perplexity_elsewhere=_perplexity(elsewhere),
        perplexity_of_others=_perplexity(others),
    )


def _perplexity(losses: Doubles) -> float:
    return exponential(float(losses.mean())) if losses.size else 1.0
