"""Words turned down: changes of memory rows that take away what promotes them, as an overlay.

Three ways, by what is taken away: what a token's memory as a whole adds to a word, in its last
layer; what single rows add; or all that single keys add to a row, whatever else they do. Knows no
files; the overlay's writer has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Floats, Ids
from edge_memllm.errors import RequestError
from edge_memllm.evaluation.perplexity import check_windows, text_tokens
from edge_memllm.interpretation.gates import refuse_directions
from edge_memllm.interpretation.head import Highest, WordDirections, vocabulary_spread
from edge_memllm.interpretation.memory import Block, Memory, check_layers, features_of
from edge_memllm.interpretation.suppression_effect import SuppressionEffect, measure_suppression
from edge_memllm.interpretation.tokens import WordTokens, word_tokens
from edge_memllm.options import Option, layer_list, positive_int
from edge_memllm.overlays import Edit, OverlaySpec, overlay_of
from edge_memllm.overlays.table import OverlaidTable
from edge_memllm.progress import Progress

if TYPE_CHECKING:
    from edge_memllm.interpretation.explaining import Subject


By = Literal["tokens", "rows", "keys"]

DEFAULT_MOST = 2000
MOST_STRENGTH = 10
_BLOCK_TOKENS = 1024  # whose coefficients are alive at once


@dataclass(frozen=True, slots=True, eq=False)
class Promoters:
    """What promotes most: rows of `tokens` [n] in `layers` [n], or the `keys` [n] of these."""

    tokens: Ids
    layers: Ids
    keys: Ids | None

    def __len__(self) -> int:
        return len(self.tokens)


def token_readings(
    memory: Memory,
    directions: WordDirections,
    gain: Floats,
    layers: Sequence[int],
    progress: Progress = lambda *_: None,
) -> Floats:
    """Return [V, W]: what each token's memory, all of `layers` together, adds to the words' logits.

    `gain` [M] is that of each memory.
    """
    total = np.zeros((memory.vocabulary, len(directions.directions)), np.float32)
    blocks = features_of(memory, "rows").blocks(
        layers, lambda done, total: progress("memory", done, total)
    )
    for block in blocks:
        total[block.ids] += directions.read(block.vectors) * gain[block.layer]
    return total


def strongest_promoters(
    memory: Memory,
    directions: WordDirections,
    gain: Floats,
    *,
    keys: bool,
    layers: Sequence[int],
    most: int,
    weights: Floats | None = None,
    progress: Progress = lambda *_: None,
) -> Promoters:
    """Return at most `most` rows, or `keys` of rows, that promote most, the strongest first.

    What counts is the sum, over the words, of what each adds to their logits where that is above
    zero. `gain` [M] is that of each memory; `weights` [V] says how much each token counts, None all
    the same. Raises `RequestError` for keys of a memory that has none.
    """
    features = features_of(memory, "coefficients" if keys else "rows")
    parts = features.size if keys else 1
    highest = Highest(most, 1)
    blocks = features.blocks(layers, lambda done, total: progress("memory", done, total))
    for block in blocks:
        promotion = _of_keys if keys else _of_rows
        found = promotion(memory, block, directions, float(gain[block.layer]))  # [N, parts]
        if weights is not None:
            found *= weights[block.ids][:, None]
        # Token, layer and key as one number.
        numbers = (block.ids[:, None] * memory.layers + block.layer) * parts + np.arange(parts)
        highest.add(numbers.ravel(), found.reshape(-1, 1))
    kept = highest.values[:, 0] > 0
    rows, key = np.divmod(highest.ids[kept, 0], parts)
    tokens, layer = np.divmod(rows, memory.layers)
    return Promoters(tokens, layer, key if keys else None)


def memory_gain(gain: Floats, memories: int) -> Floats:
    """Return the gain [M] of each memory out of that of each layer [L].

    A memory that all layers share is added once for each of them, so its gains sum up.
    """
    total: Floats = gain if memories == len(gain) else gain.sum(keepdims=True)
    return total


def _of_rows(memory: Memory, block: Block, directions: WordDirections, gain: float) -> Floats:
    found: Floats = np.maximum(directions.read(block.vectors) * gain, 0).sum(axis=1, keepdims=True)
    return found


def _of_keys(memory: Memory, block: Block, directions: WordDirections, gain: float) -> Floats:
    """What each key's part of each row promotes, [N, K]: word by word, to stay small."""
    values = directions.read(memory.values(block.layer)) * gain  # [K, W]
    total = np.zeros_like(block.vectors)
    for value in values.T:
        total += np.maximum(block.vectors * value, 0)
    return total


@dataclass(frozen=True, slots=True, eq=False)
class Suppression:
    """Changes [n, D] of the rows of `tokens` [n] in `layers` [n], by token, then layer.

    `before` and `after` [n, W] are what is added to the words' logits, gain included: by each row,
    or by tokens, by all of the token's memory. `parts` counts what was turned down: tokens, rows,
    or keys of rows.
    """

    tokens: Ids
    layers: Ids
    changes: Floats
    before: Floats
    after: Floats
    parts: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def promotion(self) -> tuple[float, float]:
        """What is added to the words' logits where that is above zero: was, and is.

        Summed over the words, mean over the rows; zero where there are none.
        """
        rows = max(1, len(self))
        was, now = (float(np.maximum(each, 0).sum()) / rows for each in (self.before, self.after))
        return was, now

    def edits(self) -> Iterator[Edit]:
        """Yield the changes as an overlay has them: rows to add."""
        for token, layer, change in zip(self.tokens, self.layers, self.changes, strict=True):
            yield Edit(int(token), int(layer), "add", change)


def suppress_words(
    memory: Memory,
    directions: WordDirections,
    gain: Floats,
    *,
    by: By = "tokens",
    strength: float = 1.0,
    most: int = DEFAULT_MOST,
    layers: Sequence[int] | None = None,
    weights: Floats | None = None,
    progress: Progress = lambda *_: None,
) -> Suppression:
    """Find what promotes words most, and return the changes that turn it down.

    `gain` [L] is the model's. `strength` is the share that is taken away: 1 all of it, 0 nothing,
    which changes no row, 2 makes its opposite of it. At most `most` tokens, rows or keys of rows
    are turned down, found in `layers`, None for all; by tokens, what these layers add together is
    taken away in the last of them that counts. `weights` [V] says how much each token counts in
    finding the strongest.

    Raises `RequestError` for values that cannot be, and for keys of a memory that has none.
    """
    layers = tuple(range(memory.layers)) if layers is None else layers
    check_layers(layers, memory.layers)
    _check(strength, most, weights, memory.vocabulary)
    gains = memory_gain(gain, memory.layers)
    most = most if strength else 0
    if by == "tokens":
        total = token_readings(memory, directions, gains, layers, progress)
        place = max((layer for layer in layers if gains[layer]), default=layers[0])
        tokens = _highest(np.maximum(total, 0).sum(axis=1), most, weights)
        return _of_tokens(directions, tokens, total[tokens], (place, gains[place]), strength)
    found = strongest_promoters(
        memory,
        directions,
        gains,
        keys=by == "keys",
        layers=layers,
        most=most,
        weights=weights,
        progress=progress,
    )
    parts = [
        _in_layer(memory, directions, gains[layer], found, layer, strength) for layer in layers
    ]
    return _joined(parts, len(found))


def _check(strength: float, most: int, weights: Floats | None, vocabulary: int) -> None:
    if not 0 <= strength <= MOST_STRENGTH:
        raise RequestError(
            f"strength is {strength:g}, expected 0 (nothing) to {MOST_STRENGTH}; 1 takes all of it."
        )
    if most < 1:
        raise RequestError(f"most is {most}, expected at least 1.")
    if weights is not None and weights.shape != (vocabulary,):
        raise RequestError(f"weights {list(weights.shape)}, expected one for each of {vocabulary}.")


def _highest(scores: Floats, most: int, weights: Floats | None) -> Ids:
    """The tokens, rising, of the `most` highest scores [V] above zero."""
    weighted = scores if weights is None else scores * weights
    order = np.argsort(-weighted, kind="stable")[:most]
    return np.sort(order[weighted[order] > 0])


def _of_tokens(
    directions: WordDirections,
    tokens: Ids,
    before: Floats,
    place: tuple[int, np.float32],
    strength: float,
) -> Suppression:
    """The change of one row of each token: in the layer `place`, for which its gain stands."""
    layer, gain = place
    changes = _taken(directions, before, gain, strength)
    after = before + directions.read(changes) * gain
    return Suppression(tokens, np.full(len(tokens), layer), changes, before, after, len(tokens))


def _in_layer(
    memory: Memory,
    directions: WordDirections,
    gain: np.float32,
    found: Promoters,
    layer: int,
    strength: float,
) -> Suppression:
    """The changes of one layer's rows."""
    inside = found.layers == layer
    ids, places = np.unique(found.tokens[inside], return_inverse=True)
    rows = memory.rows(layer, ids)
    before = directions.read(rows) * gain
    if found.keys is None:
        changes = _taken(directions, before, gain, strength)
    else:
        changes = -strength * _added_by_keys(memory, layer, ids, places, found.keys[inside])
    after = directions.read(rows + changes) * gain
    return Suppression(ids, np.full(len(ids), layer), changes, before, after, int(inside.sum()))


def _taken(directions: WordDirections, before: Floats, gain: np.float32, strength: float) -> Floats:
    """The changes [n, D] that take a share of what `before` [n, W] has above zero.

    Where the gain is zero nothing is promoted, so that there is nothing to divide.
    """
    share = np.float32(-strength) / (gain or np.float32(1))
    return directions.change(np.maximum(before, 0) * share)


def _added_by_keys(memory: Memory, layer: int, ids: Ids, places: Ids, keys: Ids) -> Floats:
    """What keys add to rows [N, D]: `keys[i]` to that of `ids[places[i]]`."""
    total = np.zeros((len(ids), memory.width), np.float32)
    named, column = np.unique(keys, return_inverse=True)
    for start in range(0, len(ids), _BLOCK_TOKENS):
        block = ids[start : start + _BLOCK_TOKENS]
        inside = (places >= start) & (places < start + len(block))
        chosen = np.zeros((len(block), len(named)), np.float32)
        chosen[places[inside] - start, column[inside]] = 1
        chosen *= memory.coefficients(layer, block, named.tolist())
        total[start : start + len(block)] = chosen @ memory.values(layer, named.tolist())
    return total


def _joined(parts: Sequence[Suppression], count: int) -> Suppression:
    """All layers' changes, in the order of an overlay."""

    def every(name: str) -> NDArray[np.float32]:
        return np.concatenate([getattr(part, name) for part in parts])

    tokens, layers = (every(name).astype(np.int64) for name in ("tokens", "layers"))
    order = np.lexsort((layers, tokens))
    changes, before, after = (every(name)[order] for name in ("changes", "before", "after"))
    return Suppression(tokens[order], layers[order], changes, before, after, count)


def other_rows(chosen: Suppression, vocabulary: int, seed: int) -> Suppression:
    """Return the same changes of as many rows in each layer, of tokens drawn from the others.

    In a layer where most tokens were chosen, they are drawn from all. Readings are not those of
    the rows drawn: only the changes are meant to be used.
    """
    random = np.random.default_rng(seed)
    tokens = chosen.tokens.copy()
    for layer in np.unique(chosen.layers):
        inside = chosen.layers == layer
        others = np.setdiff1d(np.arange(vocabulary), chosen.tokens[inside])
        pool = others if len(others) >= inside.sum() else np.arange(vocabulary)
        tokens[inside] = random.choice(pool, inside.sum(), replace=False)
    return replace(chosen, tokens=tokens)


def other_directions(chosen: Suppression, seed: int) -> Suppression:
    """Return changes of the same rows, as long as the chosen ones, in random directions."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal(chosen.changes.shape, np.float32)
    wanted, found = (
        np.linalg.norm(each, axis=1, keepdims=True) for each in (chosen.changes, drawn)
    )
    return replace(chosen, changes=drawn * (wanted / found))


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to turn down, and how; the fields are those of `word_tokens` and `suppress_words`.

    `corpus` is a text by which frequent tokens count more in finding what promotes most.
    """

    words: Annotated[
        tuple[str, ...],
        Option("words, or tokens as #12", metavar="WORD", parse=str, several="words"),
    ]
    by: Annotated[By, Option("what is turned down", group="how")] = "tokens"
    strength: Annotated[
        float,
        Option(
            "how much of it: 1 takes it away, 0 nothing, 2 turns it into its opposite", group="how"
        ),
    ] = 1.0
    most: Annotated[int, Option("turn down the N strongest", parse=positive_int, group="how")] = (
        DEFAULT_MOST
    )
    layers: Annotated[
        tuple[int, ...] | None,
        Option(
            "only what these layers add, such as 0,3-5",
            metavar="LIST",
            parse=layer_list,
            several="list",
            unset="all",
            group="how",
        ),
    ] = None
    corpus: Annotated[
        str | None,
        Option(
            "the strongest are those that matter most in this text: each counts as often as it has "
            "their token",
            reads_text=True,
            unset="once",
            group="how",
        ),
    ] = None
    pieces: Annotated[
        bool,
        Option(
            "for words that are several tokens, turn down the first, which other words begin with "
            "as well",
            group="how",
        ),
    ] = False


@dataclass(frozen=True, slots=True)
class Effects:
    """What a suppression does to texts, and what its two controls do (`suppression_controls`)."""

    suppression: SuppressionEffect
    other_rows: SuppressionEffect
    other_directions: SuppressionEffect


def words_of(subject: Subject, wish: Wish) -> WordTokens:
    """Return the tokens that a wish is about.

    Raises as `word_tokens` does, and `RequestError` for rows that are gates.
    """
    refuse_directions(subject.memory_spec)
    tokenizer = subject.predictor.tokenizer
    return word_tokens(tokenizer, subject.texts, wish.words, pieces=wish.pieces)


def suppress(
    subject: Subject, wish: Wish, words: WordTokens, progress: Progress = lambda *_: None
) -> Suppression:
    """Find what promotes the words, and turn it down.

    Raises as `suppress_words` does, and `RequestError` for rows that are gates.
    """
    refuse_directions(subject.memory_spec)
    assert subject.head is not None  # rows are vectors of the stream
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
        OverlaidTable(model.source, [overlay_of(spec, each.edits())], vocabulary)
        for each in variants
    ]
    measured = measure_suppression(
        model.runtime,
        model.source,
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
