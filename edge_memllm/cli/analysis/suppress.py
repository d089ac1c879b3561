"""``edge-memllm suppress``: what promotes some words is found, and an overlay turns it down."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_memllm.cli.analysis.explain import shown
from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_windows,
    layer_list,
    positive_int,
)
from edge_memllm.cli.output import byte_count, number, read_text, table
from edge_memllm.errors import RequestError

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm.cli.output import StageBars
    from edge_memllm.interpretation.explaining import Subject
    from edge_memllm.interpretation.findings import ModelFacts
    from edge_memllm.interpretation.suppression import Effects, Suppression, Wish
    from edge_memllm.interpretation.tokens import TokenTexts, WordToken, WordTokens
    from edge_memllm.overlays import Written


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
  edge-memllm run artifact --overlay peace.overlay.safetensors --prompt "In the end the"
"""

_SHOWN_ROWS = 8
_PARTS = {"tokens": "tokens", "rows": "rows", "keys": "keys of rows"}


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "suppress",
        execute,
        summary="find what promotes words and turn it down",
        description=_DESCRIPTION,
        examples=_EXAMPLES.rstrip("\n"),
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a checkpoint or an exported model"
    )
    parser.add_argument(
        "--words",
        action="extend",
        nargs="+",
        required=True,
        metavar="WORD",
        help="words, or tokens as #12",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the overlay, a name that ends in .overlay.safetensors",
    )
    _add_way(parser.add_argument_group("how"))
    _add_effect(parser.add_argument_group("effect"))
    parser.add_argument("--name", metavar="NAME", help="what to call it (default: as the file)")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="threads on the CPU")
    add_json(parser)


def _add_way(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--by",
        choices=("tokens", "rows", "keys"),
        default="tokens",
        help="what is turned down (default: tokens)",
    )
    group.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="X",
        help="how much of it: 1 takes it away, 0 nothing, 2 turns it into its opposite "
        "(default: 1)",
    )
    group.add_argument(
        "--most",
        type=positive_int,
        metavar="N",
        help="turn down the N strongest (default: 2000)",
    )
    group.add_argument(
        "--layers",
        action="extend",
        type=layer_list,
        metavar="LIST",
        help="only what these layers add, such as 0,3-5 (default: all)",
    )
    group.add_argument(
        "--corpus",
        type=Path,
        metavar="FILE",
        help="the strongest are those that matter most in this text: each counts as often as it "
        "has their token (default: once)",
    )
    group.add_argument(
        "--pieces",
        action="store_true",
        help="for words that are several tokens, turn down the first, which other words begin "
        "with as well",
    )


def _add_effect(group: argparse._ArgumentGroup) -> None:
    add_windows(group)
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the controls, which are drawn (default: 0)"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    _check(arguments)
    wish = _wish(arguments)
    texts = [read_text(path) for path in arguments.text or ()]

    from edge_memllm.cli.output import StageBars, write_json
    from edge_memllm.interpretation.explaining import open_subject

    with open_subject(arguments.model, arguments.threads) as subject, StageBars() as bars:
        outcome = _carry_out(arguments, subject, wish, texts, bars)
        shown = report(outcome) if arguments.json else page(outcome, subject.texts)
    if isinstance(shown, str):
        print(shown)
    else:
        write_json(shown)
    return 0


def _carry_out(
    arguments: argparse.Namespace,
    subject: Subject,
    wish: Wish,
    texts: list[str],
    progress: StageBars,
) -> Outcome:
    """Write the overlay, and measure it where there are texts."""
    from edge_memllm.interpretation.suppression import effects, suppress, words_of
    from edge_memllm.overlays import SUFFIX, OverlaySpec, OverlayWriter

    words = words_of(subject, wish)
    name = arguments.name
    name = arguments.out.name.removesuffix(SUFFIX) if name is None else name
    spec = OverlaySpec.for_model(
        subject.predictor.manifest, name, description=_described(wish, words)
    )
    # Opened first: a file that cannot be written is refused before any work.
    with OverlayWriter(arguments.out, spec, overwrite=arguments.force) as writer:
        found = suppress(subject, wish, words, progress)
        writer.add(found.tokens, found.layers, found.changes)
        measured = None
        if texts:
            windows = {"context": arguments.context, "stride": arguments.stride}
            measured = effects(
                subject,
                spec,
                found,
                words,
                texts,
                seed=arguments.seed or 0,
                progress=progress,
                **windows,
            )
        written = writer.finish()
    return Outcome(subject.facts, wish, words, found, written, measured)


def _wish(arguments: argparse.Namespace) -> Wish:
    from edge_memllm.interpretation.suppression import Wish

    chosen = {} if arguments.most is None else {"most": arguments.most}
    return Wish(
        words=tuple(arguments.words),
        pieces=arguments.pieces,
        by=arguments.by,
        strength=arguments.strength,
        layers=arguments.layers and tuple(arguments.layers),
        corpus=None if arguments.corpus is None else read_text(arguments.corpus),
        **chosen,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    for name in ("context", "stride", "seed"):
        if getattr(arguments, name) is not None and not arguments.text:
            raise RequestError(f"--{name} has no effect without --text. Give --text FILE.")


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
