"""What ``edge-memllm explain`` shows to people in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_memllm.cli.text import number, table

if TYPE_CHECKING:
    from edge_memllm.interpretation.findings import (
        Curve,
        Explanation,
        Floats,
        KeyCard,
        KeyUse,
        LayerClusters,
        LayerCurves,
        LayerUse,
        ModelFacts,
        Scored,
        Sentence,
        SimilarTokens,
        TokenCard,
    )

_MOST_POSITIONS = 64
_SHOWN_TOKENS = 6  # of a cluster


def page(found: Explanation) -> str:
    """Return all that was found, part by part."""
    parts = [
        _facts(found.model),
        *map(_token_card, found.tokens),
        *map(_key_card, found.keys),
        *_similar(found.similar),
        *_sentences(found.sentences),
        *map(_clusters, found.clusters),
        *_curves(found.curves),
    ]
    return "\n\n".join(parts)


def shown(text: str) -> str:
    """A token's text in quotes, on one line; what cannot be printed is escaped."""
    escaped = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    quote = '"' if "'" in text and '"' not in text else "'"
    return f"{quote}{''.join(escaped)}{quote}"


def _facts(model: ModelFacts) -> str:
    keys = "" if model.keys is None else f" of {number(model.keys)} keys"
    memories = "one memory for all of them" if model.memory_layers < model.layers else "a memory"
    return (
        f"{model.name}: {model.source}, {model.layers} layers of width {model.width}, "
        f"{memories}{keys}{'' if model.memory_layers < model.layers else ' each'}, "
        f"{number(model.vocabulary)} tokens"
    )


def _token_card(card: TokenCard) -> str:
    lines = [f"token {shown(card.token.text)} #{card.token.id}"]
    for use in card.layers:
        lines += ["", *_layer_use(use)]
    return "\n".join(lines)


def _layer_use(use: LayerUse) -> Iterator[str]:
    half = "" if use.keys_for_half is None else f", half of it from {use.keys_for_half} keys"
    yield f"  layer {use.layer}: a row of length {use.norm:.2f}{half}"
    yield f"    promotes    {_scored(use.promotes)}"
    yield f"    suppresses  {_scored(use.suppresses)}"
    for key in use.keys:
        yield from _key_use(key)


def _key_use(use: KeyUse) -> Iterator[str]:
    """A key as it works here: below zero, its value is subtracted."""
    card, adds = use.card, use.coefficient >= 0
    fires = card.fires if adds else card.inverts
    promotes, suppresses = card.promotes, card.suppresses
    if not adds:
        promotes, suppresses = suppresses, promotes
    yield f"    key {card.layer}:{card.key}  {use.share:+.1%}, c = {use.coefficient:+.2f}"
    yield f"      fired by    {_texts(fires)}"
    yield f"      promotes    {_texts(promotes)}"
    yield f"      suppresses  {_texts(suppresses)}"


def _key_card(card: KeyCard) -> str:
    return "\n".join(
        [
            f"key {card.layer}:{card.key}",
            f"  fired by    {_scored(card.fires)}",
            f"  inverted by {_scored(card.inverts)}",
            f"  promotes    {_scored(card.promotes)}",
            f"  suppresses  {_scored(card.suppresses)}",
        ]
    )


def _similar(found: Sequence[SimilarTokens]) -> Iterator[str]:
    for token in dict.fromkeys(each.token for each in found):
        own = [each for each in found if each.token == token]
        lines = [f"like {shown(token.text)} #{token.id}, by cosine of {own[0].features}"]
        for each in own:
            where = "all layers" if each.layer is None else f"layer {each.layer}"
            lines.append(f"  {where:<10}  {_scored(each.similar)}")
        yield "\n".join(lines)


def _sentences(found: Sequence[Sentence]) -> Iterator[str]:
    yield from map(_sentence, found)
    if found:
        yield "\n".join(_legend(with_parts=found[0].direct is not None))


def _sentence(sentence: Sentence) -> str:
    """A line for each token that is predicted; the last one is the model's own guess."""
    layers = range(sentence.without_layer.shape[1])
    head = ["token", "p", "without", "effect", *(f"layer {layer}" for layer in layers)]
    parts = _parts(sentence)
    rows = [[*head, *(["|", *parts] if parts else [])]]
    for at in _places(sentence):
        effects = (sentence.memory_effect[at], *sentence.layer_effect[at])
        row = [
            shown(sentence.targets[at].text),
            _probability(sentence.log_probability[at]),
            _probability(sentence.without_memory[at]),
            *(f"{effect:+.2f}" for effect in effects),
        ]
        rows.append(
            [*row, *(["|", *(f"{each[at]:+.2f}" for each in parts.values())] * bool(parts))]
        )
    lines = [f"text {shown(sentence.text)}", table(rows)]
    left_out = len(sentence.targets) + 1 - len(rows)
    if left_out:
        lines.append(
            f"{left_out} tokens on which memory has less effect are left out; --json has all."
        )
    return "\n\n".join(lines)


def _parts(sentence: Sentence) -> dict[str, Floats]:
    """The parts of the logits [T] by name, of all layers together; none without a network."""
    direct = sentence.direct
    if direct is None:
        return {}
    found = {"logit": direct.logit, "embedding": direct.embedding}
    found["attention"] = direct.attention.sum(axis=1)
    if direct.compute.any():
        found["FFN-C"] = direct.compute.sum(axis=1)
    return {**found, "memory": direct.memory.sum(axis=1)}


def _probability(logarithm: float) -> str:
    return f"{100 * np.exp(logarithm):.2g}%"


def _legend(*, with_parts: bool) -> Iterator[str]:
    yield (
        "p: probability of the token after what stands before it; without: the same with all "
        "memory off;\neffect: what memory adds to its logarithm, and what each layer's memory "
        "does, the others being on."
    )
    if with_parts:
        yield (
            "logit: above the mean of all tokens, and the parts it is the sum of, by who put them "
            "into the stream."
        )
    yield "The last token is the model's own guess."


def _places(sentence: Sentence) -> list[int]:
    """The positions to show: where the text is long, those with the largest effect."""
    order = np.argsort(-np.abs(sentence.memory_effect), kind="stable")[:_MOST_POSITIONS]
    return sorted(int(place) for place in order)


def _clusters(found: LayerClusters) -> str:
    rows = [("tokens", "cluster", "nearest to its centre")]
    for cluster in sorted(found.clusters, key=lambda each: -each.size):
        nearest = " ".join(shown(token.text) for token in cluster.tokens[:_SHOWN_TOKENS])
        rows.append((number(cluster.size), cluster.label, nearest))
    title = (
        f"layer {found.layer}: {len(found.clusters)} clusters of {number(found.tokens)} tokens by "
        f"their {found.features}"
    )
    parts = [f"{title}\n({found.rule})", table(rows)]
    return "\n\n".join([*parts, *_agreements(found)])


def _agreements(found: LayerClusters) -> Iterator[str]:
    if found.agreements:
        compared = ("found", "shuffled", "embeddings")
        rows: list[tuple[str, ...]] = [
            ("", "purity", "", "", "", "mutual information", "", ""),
            ("agreement with", "found", "shuffled", "z", "embeddings", *compared),
        ]
        for each in found.agreements:
            purity = (f"{each.purity:.3f}", f"{each.shuffled_purity:.3f}", f"{each.purity_z:+.0f}")
            information = (each.mutual_information, each.shuffled_mutual_information)
            others = (each.embedding_purity, *information, each.embedding_mutual_information)
            rows.append((each.labelling, *purity, *(f"{value:.3f}" for value in others)))
        yield table(rows)


def _curves(found: LayerCurves | None) -> Iterator[str]:
    if found is None:
        return
    every = (found.clustering, found.outliers, found.norms, found.dropped)
    curves = [curve for curve in every if curve is not None]
    if curves:
        rows = [("by layer", *map(str, found.layers))]
        rows += [row for curve in curves for row in _curve_rows(curve)]
        yield "\n".join([table(rows), "", *(f"{each.name}: {each.definition}" for each in curves)])
    if found.gains is not None:
        heads = ("all memory times", *(f"{gain:g}" for gain in found.gains.gains))
        groups = (
            (f"{group.name}, {group.metric}", *_figures(group.values))
            for group in found.gains.groups
        )
        yield table([heads, *groups])


def _curve_rows(curve: Curve) -> Iterator[tuple[str, ...]]:
    yield (curve.name, *_figures(curve.values))
    if curve.control is not None:
        yield ("  control", *_figures(curve.control))


def _figures(values: Iterable[float]) -> list[str]:
    return [f"{value:.3g}" for value in values]


def _scored(found: Sequence[Scored]) -> str:
    return "  ".join(f"{shown(each.token.text)} {each.value:+.2f}" for each in found) or "none"


def _texts(found: Sequence[Scored]) -> str:
    return " ".join(shown(each.token.text) for each in found) or "none"
