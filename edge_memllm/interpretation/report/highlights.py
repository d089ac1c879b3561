"""What stands out among the findings, in a few sentences at the top of the report."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_memllm.interpretation.findings import (
    Explanation,
    LayerClusters,
    LayerCurves,
    Sentence,
    TokenCard,
)
from edge_memllm.interpretation.report.cards import as_used
from edge_memllm.interpretation.report.markup import figure, percent, together
from edge_memllm.interpretation.report.token_text import name_of, running


def highlights(found: Explanation) -> list[str]:
    """Return sentences made of the figures alone; none where nothing was measured."""
    said: list[str] = []
    for sentence in found.sentences[:1]:
        said.extend(_of_sentence(sentence))
    if found.curves is not None:
        said.extend(_of_curves(found.curves))
    said.extend(_of_clusters(found.clusters))
    for card in found.tokens[:1]:
        said.extend(_of_token(card))
    return said


def _of_sentence(sentence: Sentence) -> Iterator[str]:
    effect = sentence.memory_effect
    if not np.isfinite(effect).all():
        return
    helped = int((effect > 0).sum())
    mean = figure(float(effect.mean()), signed=True)
    share = f"{helped} of {len(effect)} predictions"
    yield f"In the text, memory helps {share}; on average it adds {mean} nats."
    best = int(effect.argmax())
    if effect[best] > 0:
        with_memory, without = (
            percent(float(np.exp(each[best])))
            for each in (sentence.log_probability, sentence.without_memory)
        )
        token = name_of(sentence.targets[best])
        chances = f": {with_memory} probable with memory, {without} without."
        yield together("It helps most at ", token, chances)


def _of_curves(curves: LayerCurves) -> Iterator[str]:
    values = curves.dropped.values if curves.dropped is not None else ()
    if len(values) > 1 and np.isfinite(values).all():
        most, least = int(np.argmax(values)), int(np.argmin(values))
        costs = [f"layer {curves.layers[each]} ({figure(values[each])})" for each in (most, least)]
        yield f"With one layer's memory off, {costs[0]} is missed most, {costs[1]} least."


def _of_clusters(layers: tuple[LayerClusters, ...]) -> Iterator[str]:
    every = [(each, layer.layer) for layer in layers for each in layer.agreements]
    if every:
        best, layer = max(every, key=lambda pair: pair[0].purity - pair[0].shuffled_purity)
        shares = (best.purity, best.embedding_purity, best.shuffled_purity)
        pure, plain, chance = map(percent, shares)
        others = f"clusters of embeddings {plain}, shuffled labels {chance}"
        about = f"Clusters of layer {layer} follow {running(best.labelling)}"
        yield f"{about}: {pure} pure ({others})."


def _of_token(card: TokenCard) -> Iterator[str]:
    uses = [(key, layer.layer) for layer in card.layers for key in layer.keys]
    if uses:
        key, layer = max(uses, key=lambda pair: abs(pair[0].share))
        fires = together(*(name_of(each.token) for each in as_used(key).fires[:3]), between=", ")
        about = together(" (used most by ", fires, ")") if fires else ""
        share = f" makes {percent(key.share)} of its row there."
        leans = f": key {key.card.key} of layer {layer}"
        yield together(name_of(card.token), leans, about, share)
