"""The sections on tokens and keys: what a row does, which keys make it, what each key is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edge_memllm.interpretation.findings import (
    KeyCard,
    KeyUse,
    LayerUse,
    Scored,
    SimilarTokens,
    TokenCard,
)
from edge_memllm.interpretation.report.markup import (
    Markup,
    element,
    figure,
    note,
    panels,
    percent,
    scaled,
)
from edge_memllm.interpretation.report.token_text import chips, name_of

_BELOW_ZERO = (
    "Here the coefficient is below zero and the value is subtracted: these are the tokens that "
    "subtract it most, and what the subtracted value raises and lowers."
)


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
    parts: list[Markup] = [
        note("The row of this layer, read through the head, raises and lowers these next tokens:"),
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
