"""From a token to the keys it fires, and from a key to the tokens that fire it.

All keys that are asked for in a layer are served by one pass over the vocabulary, a chunk of it at
a time. Knows a memory and texts of tokens; nothing of how it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_memllm.arrays import Floats, Ids
from edge_memllm.engine.request import check_positive, check_tokens
from edge_memllm.errors import RequestError
from edge_memllm.interpretation.findings import (
    KeyCard,
    KeyUse,
    LayerUse,
    Scored,
    SimilarTokens,
    TokenCard,
)
from edge_memllm.interpretation.head import Head, Highest, Reading
from edge_memllm.interpretation.memory import (
    Features,
    Memory,
    check_layers,
    features_of,
    unit,
)
from edge_memllm.interpretation.tokens import token_of
from edge_memllm.progress import Counted, Progress
from edge_memllm.text.token_texts import TokenTexts

_CHUNK_BYTES = 32 << 20

_ITSELF = -2.0  # below every cosine


@dataclass(frozen=True, slots=True)
class Shares:
    """How the output of one layer's FFN-M for one token is made up, by key [K]."""

    coefficients: Floats
    shares: Floats  # c_i (v_i . o) / (o . o): they sum to one

    def strongest(self, count: int) -> list[int]:
        """Return the keys with the largest shares in size, the largest first."""
        order = np.argsort(-np.abs(self.shares), kind="stable")[:count]
        return [int(key) for key in order]

    def complete(self, use: LayerUse, cards: Iterable[KeyCard]) -> LayerUse:
        """Return what a row does with the keys that make it up, some of them with their cards."""
        keys = tuple(
            KeyUse(card, float(self.coefficients[card.key]), float(self.shares[card.key]))
            for card in cards
        )
        return replace(use, keys=keys, keys_for_half=self.keys_for_half())

    def keys_for_half(self) -> int:
        """Return how few keys, the largest shares first, make up half of the output."""
        falling = np.sort(self.shares.astype(np.float64))[::-1]
        return int(np.searchsorted(falling.cumsum(), 0.5) + 1)


def shares_of(memory: Memory, layer: int, ids: Ids) -> list[Shares]:
    """Return how the outputs of a layer's FFN-M for tokens [N] are made up of keys.

    An output of zero has no parts: all shares are zero then.
    """
    coefficients = memory.coefficients(layer, ids)  # [N, K]
    values = memory.values(layer)  # [K, D]
    outputs = coefficients @ values  # [N, D]
    squares = (outputs**2).sum(axis=1, keepdims=True)
    inner = coefficients * (outputs @ values.T)
    shares = np.divide(inner, squares, out=np.zeros_like(inner), where=squares > 0)
    return [Shares(*each) for each in zip(coefficients, shares, strict=True)]


def key_cards(
    memory: Memory,
    head: Head | None,
    wanted: Iterable[tuple[int, int]],
    texts: TokenTexts,
    *,
    count: int,
    progress: Progress = lambda *_: None,
) -> dict[tuple[int, int], KeyCard]:
    """Return the cards of keys, each asked for as (layer, key), with `count` tokens in each list.

    Raises `RequestError` for a layer or key that the network does not have.
    """
    names = list(dict.fromkeys(wanted))
    by_layer: dict[int, list[int]] = {}
    for layer, key in names:
        _check(memory, layer, key)
        by_layer.setdefault(layer, []).append(key)
    readings = _value_readings(memory, head, by_layer, count, progress)
    cards: dict[tuple[int, int], KeyCard] = {}
    for layer, keys in by_layer.items():
        fires, inverts = _fired(memory, layer, keys, count, progress)
        for column, key in enumerate(keys):
            reading = readings[layer, key]
            cards[layer, key] = KeyCard(
                layer=layer,
                key=key,
                fires=_positive(texts, fires.ids[:, column], fires.values[:, column], 1),
                inverts=_positive(texts, inverts.ids[:, column], inverts.values[:, column], -1),
                promotes=_scored(texts, *reading.promotes),
                suppresses=_scored(texts, *reading.suppresses),
            )
    return {name: cards[name] for name in names}


def token_cards(
    memory: Memory,
    head: Head | None,
    tokens: Sequence[int],
    texts: TokenTexts,
    *,
    layers: Sequence[int],
    keys: int,
    count: int,
    progress: Progress = lambda *_: None,
) -> tuple[TokenCard, ...]:
    """Return a card for each token: its row in some layers, and the `keys` strongest of each.

    Without an FFN-M a card has no keys, without a head it does not say what a row promotes. Every
    list of tokens is `count` long.
    """
    ids = np.array(tokens, np.int64)
    shares = {layer: shares_of(memory, layer, ids) for layer in layers} if memory.keys else {}
    strongest = {
        (layer, place): part.strongest(keys)
        for layer, parts in shares.items()
        for place, part in enumerate(parts)
    }
    wanted = [(layer, key) for (layer, _), found in strongest.items() for key in found]
    cards = key_cards(memory, head, wanted, texts, count=count, progress=progress)
    rows = np.concatenate([memory.rows(layer, ids) for layer in layers])  # [layers * N, D]
    readings = [None] * len(rows) if head is None else head.read(rows, count, progress)
    uses: list[list[LayerUse]] = [[] for _ in tokens]
    for number, (row, reading) in enumerate(zip(rows, readings, strict=True)):
        layer, place = layers[number // len(tokens)], number % len(tokens)
        use = _row_use(layer, row, reading, texts)
        if shares:
            used = [cards[layer, key] for key in strongest[layer, place]]
            use = shares[layer][place].complete(use, used)
        uses[place].append(use)
    return tuple(
        TokenCard(token_of(texts, token), tuple(each))
        for token, each in zip(tokens, uses, strict=True)
    )


def _row_use(layer: int, row: Floats, reading: Reading | None, texts: TokenTexts) -> LayerUse:
    """What a row [W] does, without its keys."""
    return LayerUse(
        layer=layer,
        norm=float(np.linalg.norm(row)),
        promotes=None if reading is None else _scored(texts, *reading.promotes),
        suppresses=None if reading is None else _scored(texts, *reading.suppresses),
    )


def _fired(
    memory: Memory, layer: int, keys: Sequence[int], count: int, progress: Progress
) -> tuple[Highest, Highest]:
    """The tokens of the highest and of the lowest coefficients of keys."""
    fires, inverts = Highest(count, len(keys)), Highest(count, len(keys))
    chunk = max(1, _CHUNK_BYTES // (4 * (memory.width + 2 * len(keys))))
    for start in range(0, memory.vocabulary, chunk):
        ids = np.arange(start, min(start + chunk, memory.vocabulary))
        coefficients = memory.coefficients(layer, ids, keys)
        fires.add(ids, coefficients)
        inverts.add(ids, -coefficients)
        progress(f"layer {layer}", int(ids[-1]) + 1, memory.vocabulary)
    return fires, inverts


def _value_readings(
    memory: Memory,
    head: Head | None,
    by_layer: dict[int, list[int]],
    count: int,
    progress: Progress,
) -> dict[tuple[int, int], Reading]:
    """What the values of all keys do to the logits, read in one pass over the head."""
    names = [(layer, key) for layer, keys in by_layer.items() for key in keys]
    if not names:
        return {}
    assert head is not None  # there are keys
    values = np.concatenate([memory.values(layer, keys) for layer, keys in by_layer.items()])
    return dict(zip(names, head.read(values, count, progress), strict=True))


def _positive(texts: TokenTexts, ids: Ids, values: Floats, sign: int) -> tuple[Scored, ...]:
    """Those above zero, with a sign: a list of what fires a key has none that do not."""
    kept = values > 0
    return _scored(texts, ids[kept], sign * values[kept])


def _scored(texts: TokenTexts, ids: Ids, values: Floats) -> tuple[Scored, ...]:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(Scored(token_of(texts, token), value) for token, value in pairs)


def _check(memory: Memory, layer: int, key: int) -> None:
    check_layers([layer], memory.layers)
    if memory.keys is not None and not 0 <= key < memory.keys:
        raise RequestError(f"key {key} is not in layer {layer}, which has 0 to {memory.keys - 1}.")


def similar_tokens(
    source: Memory,
    tokens: Sequence[int],
    *,
    texts: TokenTexts,
    layers: Sequence[int],
    count: int = 10,
    progress: Progress = lambda *_: None,
) -> tuple[SimilarTokens, ...]:
    """Return the `count` tokens most like each of `tokens`, in each layer and in all of them.

    Alike is a high cosine between the vectors of `features_of`; in all layers (layer None, where
    several were asked for) it is the mean of the layers' cosines. One pass over the vocabulary
    serves all. Raises `RequestError` for tokens and layers that are not there, and no count.
    """
    features = features_of(source)
    check_layers(layers, features.layers)
    check_positive("count", count)
    ids = np.array(list(dict.fromkeys(check_tokens(tokens, features.vocabulary))), np.int64)
    best = _most_similar(features, ids, layers, count, lambda *at: progress("similar", *at))
    return tuple(
        SimilarTokens(
            token_of(texts, int(token)),
            layer,
            features.kind,
            tuple(
                Scored(token_of(texts, int(other)), float(cosine))
                for other, cosine in zip(found.ids[:, column], found.values[:, column], strict=True)
                if cosine > _ITSELF
            ),
        )
        for column, token in enumerate(ids)
        for layer, found in best.items()
    )


def _most_similar(
    features: Features,
    ids: Ids,
    layers: Sequence[int],
    count: int,
    progress: Counted,
) -> dict[int | None, Highest]:
    wanted = {layer: unit(features.vectors(layer, ids)).T for layer in layers}
    best: dict[int | None, Highest] = {layer: Highest(count, len(ids)) for layer in layers}
    mean = np.zeros((features.vocabulary, len(ids)), np.float32)
    for block in features.blocks(layers, progress):
        cosines = unit(block.vectors) @ wanted[block.layer]  # [N, U]
        cosines[block.ids[:, None] == ids] = _ITSELF
        best[block.layer].add(block.ids, cosines)
        mean[block.ids] += cosines / len(layers)
    mean[ids, np.arange(len(ids))] = _ITSELF
    if len(layers) > 1:
        best[None] = Highest(count, len(ids))
        best[None].add(np.arange(features.vocabulary), mean)
    return best
