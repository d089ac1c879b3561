r"""What turning words down does, by each way and strength: on the words, and on all else.

    python benchmarks/suppression.py CHECKPOINT ARTIFACT --words French would king \
        --corpus train.txt --text valid.txt [--characters 60000] [--json FILE]

ARTIFACT is an export of CHECKPOINT: what to change is found in the one and measured on the other.
Each word is turned down by itself; a figure is the mean over the words. Half of the characters are
paragraphs of the texts that have one of the words, as many of each; the others have none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from edge_memllm.cli.output import table
from edge_memllm.evaluation.perplexity import text_tokens
from edge_memllm.interpretation.explaining import Subject, open_subject
from edge_memllm.interpretation.head import WordDirections, vocabulary_spread
from edge_memllm.interpretation.suppression import (
    Suppression,
    other_directions,
    other_rows,
    suppress_words,
)
from edge_memllm.interpretation.suppression_effect import SuppressionEffect, measure_suppression
from edge_memllm.interpretation.tokens import word_tokens
from edge_memllm.overlays import OverlaySpec, overlay_of
from edge_memllm.overlays.table import OverlaidTable

_CONTEXT, _STRIDE = 256, 128


@dataclass(frozen=True)
class Variant:
    """One way to turn words down."""

    name: str
    options: dict[str, Any]
    sparing: bool = True  # whether changes spare the rest of the vocabulary
    weighted: bool = False  # whether tokens count as often as the corpus has them


VARIANTS = (
    Variant("tokens, strength 0.5", {"strength": 0.5}),
    Variant("tokens", {}),
    Variant("tokens, strength 2", {"strength": 2.0}),
    Variant("tokens, 500 by corpus", {"most": 500}, weighted=True),
    Variant("tokens, by corpus", {}, weighted=True),
    Variant("tokens, shortest change", {}, sparing=False),
    Variant("rows", {"by": "rows"}),
    Variant("rows, by corpus", {"by": "rows"}, weighted=True),
    Variant("keys, 50 by corpus", {"by": "keys", "most": 50}, weighted=True),
    Variant("keys, 2000", {"by": "keys"}),
)


def main() -> None:
    arguments = parse()
    corpus = arguments.corpus.read_text("utf-8")[: arguments.corpus_characters]
    texts = [path.read_text("utf-8") for path in arguments.text]
    excerpt = excerpts(texts, arguments.words, arguments.characters)
    results: dict[str, dict[str, Any]] = {}
    with (
        open_subject(arguments.checkpoint, 1) as source,
        open_subject(arguments.artifact, arguments.threads) as judge,
    ):
        weights = source.texts.counts(corpus).astype(np.float32)
        spread = vocabulary_spread(source.head)
        for word in arguments.words:
            ids = word_tokens(source.predictor.tokenizer, source.texts, [word]).ids
            found = dict(changes(source, ids, spread, weights))
            effects = measured(judge, found, ids, excerpt)
            results[word] = {name: effect.as_dict() for name, effect in effects.items()}
            print(word, next(iter(effects.values())).occurrences, flush=True)
    rows = {name: summary([each[name] for each in results.values()]) for name in results[word]}
    print(page(rows))
    if arguments.json is not None:
        stored = {"words": results, "summary": rows}
        arguments.json.write_text(json.dumps(stored, indent=2) + "\n", "utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--words", nargs="+", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--corpus-characters", type=int, default=3_000_000)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def excerpts(texts: Sequence[str], words: Sequence[str], characters: int) -> str:
    """Paragraphs of all texts: half with a word, each word its share, and half with none."""
    share = characters // 2 // len(texts)
    chosen: list[str] = []
    for text in texts:
        room = {**dict.fromkeys(words, share // len(words)), None: share}
        for paragraph in filter(None, text.split("\n")):
            found = set(paragraph.split())
            wanting = next((word for word in room if word in found and room[word] > 0), None)
            if room[wanting] > 0 and (wanting is not None or found.isdisjoint(words)):
                chosen.append(paragraph)
                room[wanting] -= len(paragraph)
    return "\n".join(chosen)


def changes(
    source: Subject, ids: np.ndarray, spread: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[str, Suppression]]:
    """What each variant changes, then the controls of the second, which is the default."""
    exact = source.head.directions(ids)
    gain = np.array(source.facts.memory_gain, np.float32)
    for variant in VARIANTS:
        found = suppress_words(
            source.memory,
            WordDirections(exact, spread if variant.sparing else None),
            gain,
            weights=weights if variant.weighted else None,
            **variant.options,
        )
        yield variant.name, found
        if variant.name == "tokens":
            yield "control: other rows", other_rows(found, source.facts.vocabulary, 0)
            yield "control: other directions", other_directions(found, 0)


def measured(
    judge: Subject, found: dict[str, Suppression], ids: np.ndarray, text: str
) -> dict[str, SuppressionEffect]:
    model = judge.predictor
    tables = [
        OverlaidTable(
            model.source,
            [overlay_of(OverlaySpec.for_model(model.manifest, "x"), each.edits())],
            judge.facts.vocabulary,
        )
        for each in found.values()
    ]
    fed = text_tokens(model, text).fed
    effects = measure_suppression(
        model.runtime, model.source, tables, [fed], ids, context=_CONTEXT, stride=_STRIDE
    )
    return dict(zip(found, effects, strict=True))


def summary(effects: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the words, of those that came in the text."""
    came = [each for each in effects if each["occurrences"]]
    ratios = [
        math.log(each["after"]["perplexity_of_others"] / each["before"]["perplexity_of_others"])
        for each in effects
    ]
    logs = [each["after"]["log_probability"] - each["before"]["log_probability"] for each in came]
    ranks = [each["after"]["rank"] for each in came]
    return {
        "log_probability": fmean(logs),
        "probability": fmean(
            each["after"]["probability"] / each["before"]["probability"] for each in came
        ),
        "mass": fmean(each["after"]["mass"] / each["before"]["mass"] for each in effects),
        "rank": fmean(ranks),
        "perplexity": math.expm1(fmean(ratios)),
        "divergence": fmean(each["divergence"] for each in effects),
    }


def page(rows: dict[str, dict[str, float]]) -> str:
    head = ("by", "log p", "p, times", "mass, times", "median rank", "perplexity", "KL")
    lines = [
        (
            name,
            f"{row['log_probability']:+.2f}",
            f"{row['probability']:.3f}",
            f"{row['mass']:.3f}",
            f"{row['rank']:.0f}",
            f"{row['perplexity']:+.2%}",
            f"{row['divergence']:.4f}",
        )
        for name, row in rows.items()
    ]
    return table([head, *lines])


if __name__ == "__main__":
    main()
