"""``edge-memllm suppress``: what promotes some words is found, and an overlay turns it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from edge_memllm.cli.analysis.explain import Threads, shown
from edge_memllm.cli.options import Command, Json, TextOptions
from edge_memllm.cli.output import StageBars, byte_count, number, read_text, table, write_json
from edge_memllm.interpretation.explaining import Subject, open_subject
from edge_memllm.interpretation.findings import ModelFacts
from edge_memllm.interpretation.suppression import (
    Effects,
    Suppression,
    Wish,
    effects,
    suppress,
    words_of,
)
from edge_memllm.interpretation.tokens import WordToken, WordTokens
from edge_memllm.options import Group, Option
from edge_memllm.overlays import SUFFIX, OverlaySpec, OverlayWriter, Written
from edge_memllm.text.token_texts import TokenTexts

_MOST_DESCRIBED = 1000
_DESCRIPTION = """\
Find what in the memory promotes words, and write an overlay that takes it away: the model itself
stays as it is. Words count with and without a space before them, where that is one token.

By tokens (the default), what all layers of a token's memory together add to a word is taken away
in the last of them. By rows, what each single row adds is. By keys, chosen keys of a row are turned
off with all they do; that needs a checkpoint, and costs far more elsewhere. With --text, the
effect is measured: on the words, and on all else, against two controls. docs/explain.md
defines the figures and says what works."""

_EXAMPLES = """\
  edge-memllm suppress artifact --words French --out calm.overlay.safetensors
  edge-memllm suppress artifact --words war army --corpus train.txt --text valid.txt \\
      --out peace.overlay.safetensors
  edge-memllm suppress checkpoint --words French --by keys --most 50 --out k.overlay.safetensors
  edge-memllm run artifact --overlay peace.overlay.safetensors --prompt "In the end the\""""

_SHOWN_ROWS = 8
_PARTS = {"tokens": "tokens", "rows": "rows", "keys": "keys of rows"}


@dataclass(frozen=True)
class SuppressOptions:
    """What may be asked of ``edge-memllm suppress``."""

    model: Annotated[Path, Option("a checkpoint or an exported model")]
    _: KW_ONLY
    wish: Annotated[Wish, Group()]
    out: Annotated[Path, Option("the overlay, a name that ends in .overlay.safetensors")]
    texts: Annotated[TextOptions, Group("effect")]
    seed: Annotated[
        int,
        Option("of the controls, which are drawn", group="effect", needs=("--text",)),
    ] = 0
    name: Annotated[str | None, Option("what to call it", "NAME", unset="as the file")] = None
    force: Annotated[bool, Option("replace the file if it is there")] = False
    threads: Threads = None
    json: Json = False


def execute(options: SuppressOptions) -> int:
    """Run the command."""
    texts = [read_text(path) for path in options.texts.text]
    with open_subject(options.model, options.threads) as subject, StageBars() as bars:
        outcome = _carry_out(options, subject, texts, bars)
        found = report(outcome) if options.json else page(outcome, subject.texts)
    if isinstance(found, str):
        print(found)
    else:
        write_json(found)
    return 0


def _carry_out(
    options: SuppressOptions, subject: Subject, texts: list[str], progress: StageBars
) -> Outcome:
    """Write the overlay, and measure it where there are texts."""
    wish = options.wish
    words = words_of(subject, wish)
    name = options.out.name.removesuffix(SUFFIX) if options.name is None else options.name
    spec = OverlaySpec.for_model(
        subject.predictor.manifest, name, description=_described(wish, words)
    )
    # Opened first: a file that cannot be written is refused before any work.
    with OverlayWriter(options.out, spec, overwrite=options.force) as writer:
        found = suppress(subject, wish, words, progress)
        writer.add(found.tokens, found.layers, found.changes)
        measured = None
        if texts:
            measured = effects(
                subject,
                spec,
                found,
                words,
                texts,
                seed=options.seed,
                progress=progress,
                **options.texts.windows,
            )
        written = writer.finish()
    return Outcome(subject.facts, wish, words, found, written, measured)


def _described(wish: Wish, words: WordTokens) -> str:
    """What the overlay says of itself; as much of the list of tokens as a line holds."""
    tokens = ", ".join(ascii(each.token.text) for each in words.taken)
    return f"{tokens[:_MOST_DESCRIBED]} turned down by {wish.by}, strength {wish.strength:g}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that one call did; `effects` only where texts were given."""

    model: ModelFacts
    wish: Wish
    words: WordTokens
    found: Suppression
    written: Written
    effects: Effects | None


def page(outcome: Outcome, texts: TokenTexts) -> str:
    """Return everything as people read it."""
    parts = [table(list(_summary(outcome))), *_strongest(outcome, texts), *_effects(outcome)]
    return "\n\n".join(parts)


def report(outcome: Outcome) -> dict[str, Any]:
    """Return everything as one JSON object."""
    found, written, wish = outcome.found, outcome.written, outcome.wish
    order = _by_promotion(found)
    return {
        "model": outcome.model.as_dict(),
        "words": outcome.words.as_dict(),
        "word_ids": outcome.words.ids.tolist(),
        "by": wish.by,
        "strength": wish.strength,
        "most": wish.most,
        "layers": None if wish.layers is None else list(wish.layers),
        "parts": found.parts,
        "rows": len(found),
        "promotion_before": found.promotion[0],
        "promotion_after": found.promotion[1],
        "changed": [
            {
                "token": int(found.tokens[place]),
                "layer": int(found.layers[place]),
                "before": [float(each) for each in found.before[place]],
                "after": [float(each) for each in found.after[place]],
            }
            for place in order
        ],
        "overlay": {
            "file": str(written.path),
            "name": written.spec.name,
            "description": written.spec.description,
            "bytes": written.bytes,
        },
        "effects": None
        if outcome.effects is None
        else {
            "suppression": outcome.effects.suppression.as_dict(),
            "other_rows": outcome.effects.other_rows.as_dict(),
            "other_directions": outcome.effects.other_directions.as_dict(),
        },
    }


def _summary(outcome: Outcome) -> Iterator[tuple[str, str]]:
    found, written, wish = outcome.found, outcome.written, outcome.wish
    yield "words", ", ".join(map(_word, outcome.words.taken))
    if outcome.words.left_out:
        yield "left out", ", ".join(map(_word, outcome.words.left_out))
    yield "found", f"{number(found.parts)} {_PARTS[wish.by]} that promote them"
    if not len(found):
        yield "overlay", f"{written.path}, which changes nothing"
        return
    layers = ", ".join(map(str, sorted(set(found.layers.tolist()))))
    each = "token" if wish.by == "tokens" else "row"
    yield "changed", f"{number(len(found))} rows, layer {layers}"
    was, now = found.promotion
    yield "promotion", f"{was:.2f} before, {_plain(now)} after, mean of a {each}"
    size = byte_count(written.bytes)
    yield "overlay", f"{written.path} ({size}), named {written.spec.name}"


def _word(word: WordToken) -> str:
    name = f"{shown(word.token.text)} (#{word.token.id})"
    return name if word.whole else f"{name}, the first piece of {shown(word.spelling)}"


def _strongest(outcome: Outcome, texts: TokenTexts) -> Iterator[str]:
    """The tokens or rows that promoted most."""
    found = outcome.found
    if not len(found):
        return
    rows = [("promoted most by", "layer", "before", "after")]
    for place in _by_promotion(found)[:_SHOWN_ROWS]:
        was, now = (float(each[place].sum()) for each in (found.before, found.after))
        layer = "sum" if outcome.wish.by == "tokens" else str(found.layers[place])
        name = shown(texts.text(int(found.tokens[place])))
        rows.append((name, layer, f"{was:.2f}", _plain(now)))
    yield table(rows)


def _plain(value: float) -> str:
    """Two decimals, and no minus in front of what rounds to zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _by_promotion(found: Suppression) -> list[int]:
    scores = np.maximum(found.before, 0).sum(axis=1)
    return [int(place) for place in np.argsort(-scores, kind="stable")]


def _effects(outcome: Outcome) -> Iterator[str]:
    if outcome.effects is None:
        return
    every = (
        outcome.effects.suppression,
        outcome.effects.other_rows,
        outcome.effects.other_directions,
    )
    first = every[0]
    sides = (first.before, *(each.after for each in every))
    shown_figures = [each for each in _FIGURES if getattr(first.before, each[1]) is not None]
    yield table(
        [
            ("", "before", "after", "other rows", "other directions"),
            *(
                (name, *(form(getattr(side, field)) for side in sides))
                for name, field, form in shown_figures
            ),
            ("KL of all else, nats", "", *(f"{each.divergence:.5f}" for each in every)),
        ]
    )
    came = number(first.occurrences) if first.occurrences else "none"
    yield (
        f"{number(first.tokens)} tokens, {came} of them the words'. Controls: as many changes of "
        "the same length,\nof other rows, or of these rows in other directions"
    )


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("probability, where they came", "probability", "{:.3%}".format),
    ("log-probability, there", "log_probability", "{:.3f}".format),
    ("median rank, there", "rank", "{:,.0f}".format),
    ("probability, anywhere", "mass", "{:.4%}".format),
    ("perplexity of all else", "perplexity_elsewhere", "{:.3f}".format),
    ("the same without the words", "perplexity_of_others", "{:.3f}".format),
)


SUPPRESS = Command(SuppressOptions, execute, _DESCRIPTION, _EXAMPLES)
