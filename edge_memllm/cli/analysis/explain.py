"""``edge-memllm explain``: what is in a model's memory, and where in a text it matters."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from edge_memllm.arrays import Doubles
from edge_memllm.artifact.atomic import write_whole
from edge_memllm.cli.options import Command, Json, TaskOptions
from edge_memllm.cli.output import StageBars, number, table, write_json
from edge_memllm.errors import RequestError
from edge_memllm.evaluation import read_tasks
from edge_memllm.interpretation.explaining import Questions, explain, open_subject
from edge_memllm.interpretation.findings import (
    Curve,
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
from edge_memllm.interpretation.report import html_page
from edge_memllm.options import Group, Option, positive_int

_DESCRIPTION = """\
Look into the memory of a checkpoint or an artifact: what a token's memory does and which keys it
is made of, which tokens fire a key, which tokens have a similar memory, into what clusters the
vocabulary falls, how the layers differ, and where in a text memory matters. docs/explain.md walks
through it and defines every figure.

Keys, coefficients and the parts of a logit are in the weights: they need a checkpoint and the
export extra. An artifact answers the rest, without torch. Rows that are gates, as Gemma's, are not
read through the head and have no keys; what is left out is said. A word means the token with a
space before it where there is one; give the space yourself, or the number of a token as #12, for
another."""

_EXAMPLES = """\
  edge-memllm explain checkpoint --text "The capital of France is Paris."
  edge-memllm explain checkpoint --token London --layers 0,4
  edge-memllm explain checkpoint --key 0:443 --similar London --html memory.html
  edge-memllm explain checkpoint --clusters --layer-curves --corpus valid.txt --html curves.html
  edge-memllm explain artifact --text "The river runs to the sea." --json"""

_MOST_POSITIONS = 64
_SHOWN_TOKENS = 6  # of a cluster


Threads = Annotated[int | None, Option("threads on the CPU", parse=positive_int)]


@dataclass(frozen=True)
class ExplainOptions:
    """What may be asked of ``edge-memllm explain``."""

    model: Annotated[Path, Option("a checkpoint or an exported model")]
    _: KW_ONLY
    html: Annotated[Path | None, Option("also write a page with pictures")] = None
    overwrite: Annotated[bool, Option("replace the page in --html", needs=("--html",))] = False
    json: Json = False
    questions: Annotated[Questions, Group()]
    tasks: Annotated[TaskOptions, Group("the sweep of gains, of --layer-curves")]
    threads: Threads = None

    def check(self) -> None:
        """Refuse tasks that nothing is scored on, and a page that is there already."""
        if self.tasks.task and not self.questions.curves:
            raise RequestError(
                "--task has no effect without --layer-curves. Give --layer-curves, or leave it out."
            )
        if self.html is not None and self.html.exists() and not self.overwrite:
            raise RequestError(
                f"{self.html}: is there already. Choose another name, or give --overwrite."
            )


def execute(options: ExplainOptions) -> int:
    """Run the command."""
    options.check()
    tasks = tuple(read_tasks(options.tasks.task, limit=options.tasks.limit))
    questions = replace(options.questions, tasks=tasks)
    with open_subject(options.model, options.threads) as subject, StageBars() as bars:
        command = shlex.join(["edge-memllm", *sys.argv[1:]])
        found = explain(subject, questions, command=command, progress=bars)
    if options.html is not None:
        write_whole(options.html, html_page(found))
    if options.json:
        write_json(found.as_dict())
        return 0
    print(page(found))
    if options.html is not None:
        print(f"\npage: {options.html}")
    return 0


def page(found: Explanation) -> str:
    """Return all that was found, part by part."""
    parts = [
        _facts(found.model),
        *(["\n".join(found.notes)] if found.notes else []),
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
    one = "gate" if model.memory_kind == "gate" else "memory"
    shared = model.memory_layers < model.layers
    memories = f"one {one} for all of them{keys}" if shared else f"a {one}{keys} each"
    return (
        f"{model.name}: {model.source}, {model.layers} layers of width {model.width}, {memories}, "
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
    if use.promotes is not None and use.suppresses is not None:
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


def _parts(sentence: Sentence) -> dict[str, Doubles]:
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
        yield f"{table([heads, *groups])}\n\nall memory times: {found.gains.definition}"


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


EXPLAIN = Command(ExplainOptions, execute, _DESCRIPTION, _EXAMPLES)
