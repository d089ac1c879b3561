"""From words to an overlay that turns them down, and to what it does: one call for each.

Puts the parts of suppression together for an opened model; computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_memllm.interpretation.promoters import By
from edge_memllm.interpretation.suppression import DEFAULT_MOST, Suppression, suppress_words
from edge_memllm.interpretation.suppression_controls import other_directions, other_rows
from edge_memllm.interpretation.suppression_effect import SuppressionEffect, measure_suppression
from edge_memllm.interpretation.word_directions import WordDirections, vocabulary_spread
from edge_memllm.interpretation.word_tokens import WordTokens, word_tokens
from edge_memllm.overlays import OverlaySpec, overlay_of
from edge_memllm.overlays.overlaid_table import OverlaidTable
from edge_memllm.perplexity import check_windows, text_tokens

if TYPE_CHECKING:
    from edge_memllm.interpretation.subject import Subject

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to turn down, and how; the fields are those of `word_tokens` and `suppress_words`.

    `corpus` is a text by which frequent tokens count more in finding what promotes most.
    """

    words: tuple[str, ...]
    pieces: bool = False
    by: By = "tokens"
    strength: float = 1.0
    most: int = DEFAULT_MOST
    layers: tuple[int, ...] | None = None
    corpus: str | None = None


@dataclass(frozen=True, slots=True)
class Effects:
    """What a suppression does to texts, and what its two controls do (`suppression_controls`)."""

    suppression: SuppressionEffect
    other_rows: SuppressionEffect
    other_directions: SuppressionEffect


def words_of(subject: Subject, wish: Wish) -> WordTokens:
    """Return the tokens that a wish is about. Raises as `word_tokens` does."""
    tokenizer = subject.predictor.tokenizer
    return word_tokens(tokenizer, subject.texts, wish.words, pieces=wish.pieces)


def suppress(
    subject: Subject, wish: Wish, words: WordTokens, progress: Progress = lambda *_: None
) -> Suppression:
    """Find what promotes the words, and turn it down. Raises as `suppress_words` does."""
    if wish.by == "keys":
        subject.memory.values(0, [])  # refuses, and says why there are no keys
    ids = words.ids
    directions = WordDirections(
        subject.head.directions(ids), vocabulary_spread(subject.head, progress)
    )
    return suppress_words(
        subject.memory,
        directions,
        np.array(subject.facts.memory_gain, np.float32),
        by=wish.by,
        strength=wish.strength,
        most=wish.most,
        layers=wish.layers,
        weights=None if wish.corpus is None else _frequencies(subject, wish.corpus),
        progress=progress,
    )


def effects(
    subject: Subject,
    spec: OverlaySpec,
    found: Suppression,
    words: WordTokens,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Effects:
    """Measure on texts what the overlay of `spec` would do, and what its controls do.

    `seed` is that of the controls; windows are those of `perplexity.measure_perplexity`. Raises
    `RequestError` for a text with nothing to predict, or windows that cannot be.
    """
    model = subject.predictor
    vocabulary = subject.facts.vocabulary
    most = model.manifest.model.max_position_embeddings
    context, stride = check_windows(context, stride, most)
    variants = (found, other_rows(found, vocabulary, seed), other_directions(found, seed))
    laid = [
        OverlaidTable(model.table, [overlay_of(spec, each.edits())], vocabulary)
        for each in variants
    ]
    measured = measure_suppression(
        model.runtime,
        model.table,
        laid,
        [text_tokens(model, text).fed for text in texts],
        words.ids,
        context=context,
        stride=stride,
        progress=progress,
    )
    return Effects(*measured)


def _frequencies(subject: Subject, corpus: str) -> np.ndarray:
    return subject.texts.counts(corpus).astype(np.float32)
