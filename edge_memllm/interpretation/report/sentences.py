"""The section on a text: every predicted token coloured by what the memory did for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_memllm.arrays import Doubles
from edge_memllm.interpretation.findings import Sentence
from edge_memllm.interpretation.report.markup import (
    MINUS,
    Markup,
    details,
    element,
    figure,
    note,
    percent,
    running,
    scaled,
    table,
    visible,
)

_WITHIN = 97.0  # per cent of the values that the colours tell apart
_DIGITS = 6  # of figures given to the script

EFFECT = (
    "Nats that memory adds to the log-probability of the token: its log-probability less that "
    f"with the memory off. +0.7 doubles the probability, {MINUS}0.7 halves it."
)
_PARTS = {
    "memory": "What memory rows add directly to the token's logit (less the mean over all tokens).",
    "attention": "What attention adds directly to the token's logit, for comparison.",
    "compute": "What the contextual feed-forward adds directly to the token's logit.",
}
_NAMES = {"memory": "Memory, direct", "attention": "Attention, direct", "compute": "FFN-C, direct"}


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of every target [T], and of every layer of it [T, L]."""

    name: str
    definition: str
    unit: str
    total: Doubles
    layers: Doubles

    @property
    def total_limit(self) -> float:
        """What the strongest colour means when all layers are shown."""
        return _limit(self.total)

    @property
    def layer_limit(self) -> float:
        """What the strongest colour means for one layer, the same in all."""
        return _limit(self.layers)

    def as_data(self) -> dict[str, Any]:
        """Return what the script needs to show this measure."""
        return {
            "name": self.name,
            "definition": self.definition,
            "unit": self.unit,
            "total": _rounded(self.total),
            "layers": _rounded(self.layers.T),
            "limits": [_short(self.total_limit), _short(self.layer_limit)],
        }


def measures(sentence: Sentence) -> list[Measure]:
    """Return what a sentence can be coloured by, the effect first."""
    effect = (sentence.memory_effect, sentence.layer_effect)
    found = [Measure("Effect of memory", EFFECT, "nats", *effect)]
    if sentence.direct is not None:
        for part, definition in _PARTS.items():
            layers: Doubles = getattr(sentence.direct, part)
            if part != "compute" or layers.any():
                found.append(Measure(_NAMES[part], definition, "logit", layers.sum(axis=1), layers))
    return found


def sentence_data(sentence: Sentence) -> dict[str, Any]:
    """Return the figures of a sentence for the script."""
    return {
        "tokens": [visible(each.text) for each in sentence.targets],
        "with": [percent(each) for each in np.exp(sentence.log_probability)],
        "without": [percent(each) for each in np.exp(sentence.without_memory)],
        "measures": [each.as_data() for each in measures(sentence)],
    }


def sentence_section(sentence: Sentence, number: int) -> Markup:
    """Return the section of one sentence; `number` is its place in the script's data."""
    shown = measures(sentence)[0]
    return element(
        "div",
        element("div", class_="switches"),
        _text(sentence, shown),
        _legend(shown),
        element("div", class_="selected", aria_live="polite"),
        _heat(sentence, shown),
        _numbers(sentence),
        class_="sentence",
        data_sentence=str(number),
    )


def _text(sentence: Sentence, shown: Measure) -> Markup:
    """The text itself: what comes first is predicted by nothing, what comes last was not fed."""
    first = element("span", running(sentence.tokens[0].text), class_="given")
    targets = []
    last = len(sentence.targets) - 1
    for place, token in enumerate(sentence.targets):
        words = element(
            "span",
            running(token.text) or visible(token.text),
            class_="t guess" if place == last else "t",
            style=scaled(float(shown.total[place]), shown.total_limit),
            title=_hint(sentence, place, shown),
            data_t=str(place),
        )
        targets.append(words)
    return element("p", first, *targets, class_="text", dir="auto")


def _hint(sentence: Sentence, place: int, shown: Measure) -> str:
    with_memory, without = (
        percent(float(np.exp(each[place])))
        for each in (sentence.log_probability, sentence.without_memory)
    )
    value = figure(float(shown.total[place]), signed=True)
    word = visible(sentence.targets[place].text)
    return f"{word}  {with_memory} with memory, {without} without ({value} {shown.unit})"


def _legend(shown: Measure) -> Markup:
    limit = figure(shown.total_limit)
    return element(
        "div",
        element("span", f"{MINUS}{limit} or less", class_="low"),
        element("span", class_="scale", role="img", aria_label="colour scale"),
        element("span", f"+{limit} {shown.unit} or more", class_="high"),
        element("span", shown.definition, class_="soft definition"),
        class_="legend",
    )


def _heat(sentence: Sentence, shown: Measure) -> Markup:
    """A cell for every layer and target: where in depth and where in the text."""
    count = shown.layers.shape[1]
    parts: list[Markup] = [element("span", class_="corner")]
    parts.extend(
        element("span", element("bdi", visible(token.text)), class_="word", data_t=str(place))
        for place, token in enumerate(sentence.targets)
    )
    for layer in reversed(range(count)):
        parts.append(element("span", f"layer {layer}", class_="row"))
        parts.extend(
            element(
                "i",
                style=scaled(float(value), shown.layer_limit),
                data_t=str(place),
                data_l=str(layer),
            )
            for place, value in enumerate(shown.layers[:, layer])
        )
    grid = element(
        "div",
        *parts,
        class_="heat",
        style=f"--columns:{len(sentence.targets)}",
        aria_hidden="true",
    )
    words = "Every layer alone. The last layer is at the top; the table below has the figures."
    return element("figure", element("div", grid, class_="wide"), element("figcaption", words))


def _numbers(sentence: Sentence) -> Markup:
    """The same for those who want figures, or cannot see colours."""
    count = sentence.without_layer.shape[1]
    head = ["token", "probability", "without memory", "effect, nats"]
    head += [f"layer {layer} alone" for layer in range(count)]
    columns: list[Sequence[str]] = [
        [visible(token.text) for token in sentence.targets],
        [percent(each) for each in np.exp(sentence.log_probability)],
        [percent(each) for each in np.exp(sentence.without_memory)],
        _written(sentence.memory_effect),
        *(_written(each) for each in sentence.layer_effect.T),
    ]
    parts = sentence.direct
    if parts is not None:
        head += ["logit", "of it embedding", "attention", "FFN-C", "memory"]
        sums = (each.sum(axis=1) for each in (parts.attention, parts.compute, parts.memory))
        columns += [_written(each) for each in (parts.logit, parts.embedding, *sums)]
    rows = zip(*columns, strict=True)
    return details(
        "All figures",
        _explained(sentence),
        table(head, rows, caption="What memory does for each token of the text"),
    )


def _explained(sentence: Sentence) -> Markup:
    words = (
        "Effects of single layers need not add up to the effect of all: layers after it react to "
        "what a layer adds."
    )
    if sentence.direct is None:
        return note(words, " The direct parts of a logit need a checkpoint.")
    exact = (
        " The logit (less the mean over the vocabulary) is exactly embedding + attention + FFN-C "
        "+ memory."
    )
    return note(words, exact)


def _written(values: Doubles) -> list[str]:
    return [figure(float(each), signed=True) for each in values]


def _limit(values: Doubles) -> float:
    """The size that all but a few stay within, so that one value does not pale the others."""
    finite = np.abs(values[np.isfinite(values)])
    return float(np.percentile(finite, _WITHIN)) if finite.size else 0.0


def _rounded(values: Doubles) -> list[Any]:
    if values.ndim > 1:
        return [_rounded(each) for each in values]
    return [_short(float(each)) for each in values]


def _short(value: float) -> float | None:
    """A figure as JSON has it: a few digits, and null for what is no number."""
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
