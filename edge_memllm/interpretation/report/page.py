"""The report: one HTML page that needs nothing else, in light and in dark, with or without script.

Shows an `Explanation`, whatever is in it. All text that comes from a model is escaped, and the
page's own policy lets a browser run nothing but the script that is written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files

import numpy as np

from edge_memllm.interpretation.findings import (
    Explanation,
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
from edge_memllm.interpretation.report.markup import (
    Markup,
    chips,
    element,
    figure,
    name_of,
    note,
    panels,
    percent,
    running,
    scaled,
    together,
)
from edge_memllm.interpretation.report.pictures import cluster_data, cluster_section, curve_section
from edge_memllm.interpretation.report.sentences import sentence_data, sentence_section
from edge_memllm.svg import STYLE

_BELOW_ZERO = (
    "Here the coefficient is below zero and the value is subtracted: these are the tokens that "
    "subtract it most, and what the subtracted value raises and lowers."
)

_FAMILY = {None: "with token memory", 0: "MemoryLLM"}


def token_section(cards: Sequence[TokenCard]) -> Markup:
    """Return a card for each token, with a panel for each of its layers."""
    return element("div", *(_token(each) for each in cards))


def key_section(cards: Sequence[KeyCard]) -> Markup:
    """Return a card for each key that was asked for."""
    return element("div", *(_key(each) for each in cards), class_="grid")


def similar_section(found: Sequence[SimilarTokens]) -> Markup:
    """Return, for each token, those with the most similar memory: by layer, and in all of them."""
    tokens = {each.token.id: each.token for each in found}
    cards = []
    for token in tokens.values():
        lists = [each for each in found if each.token.id == token.id]
        shown = [
            ("all" if each.layer is None else str(each.layer), _nearest(each)) for each in lists
        ]
        # All layers together say most about a token: that panel first.
        shown.sort(key=lambda each: each[0] != "all")
        cards.append(_card(name_of(token), panels("Layer", shown)))
    return element("div", *cards, class_="grid")


def _token(card: TokenCard) -> Markup:
    most = max((each.norm for each in card.layers), default=0.0)
    bars = (
        element(
            "li",
            element("span", f"layer {each.layer}"),
            element(
                "span", element("b", figure(each.norm)), class_="bar", style=scaled(each.norm, most)
            ),
        )
        for each in card.layers
    )
    lengths = element(
        "div",
        element("h4", "Length of its row"),
        element("ul", *bars, class_="lengths"),
        class_="overview",
    )
    uses = panels("Layer", [(str(each.layer), _layer(each)) for each in card.layers])
    title = element("span", name_of(card.token), element("small", f" token {card.token.id}"))
    return _card(title, element("div", lengths, uses, class_="columns"))


def _layer(use: LayerUse) -> Markup:
    parts: list[Markup] = []
    if use.promotes is not None and use.suppresses is not None:
        parts += [
            note(
                "Read through the head, the row of this layer raises and lowers these next tokens:"
            ),
            chips(use.promotes, "promotes"),
            chips(use.suppresses, "suppresses"),
        ]
    if use.keys:
        half = "" if use.keys_for_half is None else f" {_counted(use.keys_for_half)} half of it."
        strongest = f"The {len(use.keys)} keys with the largest share of the row.{half}"
        parts.append(note(strongest))
        most = max(abs(each.share) for each in use.keys)
        parts.append(element("ol", *(_use(each, most) for each in use.keys), class_="keys-used"))
    return element("div", *parts)


def as_used(use: KeyUse) -> KeyCard:
    """Return a key's card as one token uses it: turned round where the value is subtracted."""
    card = use.card
    if use.coefficient >= 0:
        return card
    return replace(
        card,
        fires=card.inverts,
        inverts=card.fires,
        promotes=_negated(card.suppresses),
        suppresses=_negated(card.promotes),
    )


def _negated(scored: tuple[Scored, ...]) -> tuple[Scored, ...]:
    return tuple(replace(each, value=-each.value) for each in scored)


def _counted(keys: int) -> str:
    return "One key makes" if keys == 1 else f"{keys:,} keys make"


def _use(use: KeyUse, most: float) -> Markup:
    head = element(
        "summary",
        element("span", f"key {use.card.key}", class_="key-name"),
        element(
            "span", element("b", percent(use.share)), class_="bar", style=scaled(use.share, most)
        ),
        element("span", f"c = {figure(use.coefficient, signed=True)}", class_="soft"),
        element(
            "span", *(name_of(each.token) for each in as_used(use).fires[:4]), class_="samples"
        ),
    )
    below = [note(_BELOW_ZERO)] if use.coefficient < 0 else []
    return element("li", element("details", head, *below, _about(as_used(use))))


def _key(card: KeyCard) -> Markup:
    return _card(element("span", f"Layer {card.layer}, key {card.key}"), _about(card))


def _about(card: KeyCard) -> Markup:
    inverted = [chips(card.inverts, "inverted by")] if card.inverts else []
    return element(
        "div",
        chips(card.fires, "fired by"),
        *inverted,
        chips(card.promotes, "promotes"),
        chips(card.suppresses, "suppresses"),
    )


def _nearest(found: SimilarTokens) -> Markup:
    most = max((abs(each.value) for each in found.similar), default=0.0)
    items = (
        element(
            "li",
            name_of(each.token),
            element(
                "span",
                element("b", f"{each.value:.3f}"),
                class_="bar",
                style=scaled(each.value, most),
            ),
        )
        for each in found.similar
    )
    return element(
        "div", element("ol", *items, class_="nearest"), note(f"Cosine of {found.features}.")
    )


def _card(title: Markup, *inside: Markup) -> Markup:
    return element("article", element("h3", title), *inside, class_="card")


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


def html_page(explanation: Explanation) -> str:
    """Return the page as HTML5, to be stored as UTF-8, which all of it can be."""
    sections = list(_sections(explanation))
    name = running(explanation.model.name)
    body = [
        _header(explanation),
        *([_contents(sections)] if len(sections) > 1 else []),
        element("main", *(_section(*each) for each in sections)),
        element("script", _data(explanation), type="application/json", id="data"),
        element("script", _file("page.js")),
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"Inside the memory of {name}"),
        element("style", Markup(STYLE + _file("page.css"))),
    ]
    whole = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _sections(found: Explanation) -> Iterator[tuple[str, str, Markup]]:
    """Anchor, title and content of all that was asked for."""
    if found.sentences:
        texts = [sentence_section(each, place) for place, each in enumerate(found.sentences)]
        yield "text", "Where in a text memory matters", together(*texts)
    if found.clusters:
        yield "clusters", "What memory groups together", cluster_section(found.clusters)
    if found.curves is not None:
        yield "layers", "How the layers differ", curve_section(found.curves)
    if found.tokens:
        yield "tokens", "What a token's memory holds", token_section(found.tokens)
    if found.keys:
        yield "keys", "What a key is about", key_section(found.keys)
    if found.similar:
        yield "similar", "Tokens with similar memory", similar_section(found.similar)


def _contents(sections: Sequence[tuple[str, str, Markup]]) -> Markup:
    links = (element("a", title, href=f"#{key}") for key, title, _ in sections)
    return element("nav", *links, aria_label="Contents")


def _section(key: str, title: str, inside: Markup) -> Markup:
    return element("section", element("h2", title), inside, id=key, class_="part")


def _header(found: Explanation) -> Markup:
    model = found.model
    said = highlights(found)
    return element(
        "header",
        element("p", "Inside the memory of", class_="soft over"),
        element("h1", running(model.name)),
        element("dl", *_facts(model), class_="facts"),
        *([element("ul", *(element("li", each) for each in said), class_="said")] if said else []),
        *map(note, found.notes),
        note("Made by ", element("code", running(found.command))),
    )


def _facts(model: ModelFacts) -> Iterator[Markup]:
    family = _FAMILY.get(model.beta, f"Flex-MemoryLLM, beta {model.beta}")
    if model.memory_kind == "gate":
        family = "with a gate for each token and layer"
    rows = {
        "model": family,
        "layers": f"{model.layers}",
        "width": f"{model.width:,}",
        "vocabulary": f"{model.vocabulary:,} tokens",
    }
    if model.memory_layers != model.layers:
        rows["memories of a token"] = f"{model.memory_layers}"
    if model.keys is not None:
        rows["keys per layer"] = f"{model.keys:,}"
    if any(gain != 1 for gain in model.memory_gain):
        rows["memory gain"] = ", ".join(figure(gain) for gain in model.memory_gain)
    rows["read from"] = f"the {running(model.source)}"
    rows["identity"] = running(model.identity)[:19]
    for name, value in rows.items():
        whole = model.identity if name == "identity" else None
        yield element(
            "div", element("dt", name), element("dd", value, title=whole and running(whole))
        )


def _data(found: Explanation) -> Markup:
    """Return what the script reads, as JSON that no text in it can end."""
    data = {
        "sentences": [sentence_data(each) for each in found.sentences],
        "clusters": cluster_data(found.clusters),
    }
    written = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_file("page.js").encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text("utf-8"))
