"""Perplexity at equal total and at equal active parameters (Table 2, Figs. 9 and 10)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from benchmarks.paper.page.gaps import gap_chart, gap_words, gaps_to_base
from benchmarks.paper.page.layout import (
    COLOUR,
    FAMILY,
    MISSING,
    TOKENS,
    VARIANTS,
    Claim,
    Entries,
    Section,
    image,
    table,
)
from benchmarks.paper.page.published import TABLE_2
from benchmarks.paper.page.seeds import Samples
from edge_memllm.charts import Line, line_chart
from edge_memllm.drawing import Box, beside, dot, frame, picture, spanning

_TEXTS = ("Wikipedia", "novels", "Wikitext-2", "together")
_FIRST_TOKENS = 1e6  # of the curves: before that all fall alike
_TRAINING = """\
Perplexity of each run. To the commands belong `--data DATA/enwiki-slice/train.txt
DATA/eltec-eng/train.txt --valid DATA/enwiki-slice/valid.txt DATA/eltec-eng/valid.txt`; parameters
are those of the layers, without embedding and head, as the paper counts. All were trained with the
same settings; none were searched for."""


def quality_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `perplexity`."""
    family = {name: each for name, each in entries.items() if each["variant"] in VARIANTS}
    title = "Perplexity at equal total and equal active parameters (Table 2, Figs. 9 and 10)"
    if not family:
        return Section(title, f"{MISSING}.")
    samples = losses(family)
    pictures = {
        "paper-active.svg": _by_active(family, samples),
        "paper-curves.svg": _curves(family),
    }
    parts = [
        _TRAINING,
        _runs_table(family),
        _noise(samples),
        image("paper-active.svg", "Perplexity by active parameters, one dot for each run."),
        image("paper-curves.svg", "Training loss by tokens, one line for each model."),
    ]
    if gaps := gaps_to_base(family):
        pictures["paper-gap.svg"] = gap_chart(gaps)
        parts.append(image("paper-gap.svg", "Training loss less that of Base, by tokens."))
    parts += [gap_words(gaps), "The paper's Table 2, 50 B tokens of C4:", _paper_table()]
    return Section(title, "\n\n".join(parts), tuple(_claims(samples)), pictures, "perplexity")


def losses(entries: Entries) -> Samples:
    """Return nats per token on the texts together, by model."""
    found: dict[str, list[float]] = {}
    for each in entries.values():
        loss = each["figures"]["texts"]["together"]["nll_per_token"]
        found.setdefault(each["variant"], []).append(loss)
    return Samples(found)


def _runs_table(family: Entries) -> str:
    head = ["model", "active", "total", "seed", *_TEXTS, "bits per byte", "command"]
    rows = []
    for variant, words in VARIANTS.items():
        runs = [each for each in family.values() if each["variant"] == variant]
        for run in sorted(runs, key=lambda each: each["seed"]):
            texts = run["figures"]["texts"]
            rows.append(
                [
                    words,
                    f"{run['model']['active'] / 1e6:.2f} M",
                    f"{run['model']['total'] / 1e6:.2f} M",
                    str(run["seed"]),
                    *(f"{texts[name]['perplexity']:.2f}" for name in _TEXTS),
                    f"{texts['together']['bits_per_byte']:.4f}",
                    f"`{training_command(variant, run['seed'])}`",
                ]
            )
        if not runs:
            rows.append([words, *["-"] * 2, "-", MISSING, *["-"] * (len(head) - 5)])
    return table(head, rows)


def training_command(recipe: str, seed: int, name: str | None = None) -> str:
    """Return how a run was trained; `name` is what it is called if not as its recipe."""
    words = f"edge-memllm train examples/recipes/{recipe}.toml --out runs/{name or recipe}-s{seed}"
    return words if seed == 1 else f"{words} --set training.seed={seed}"


def _noise(samples: Samples) -> str:
    noise = samples.noise()
    if noise is None:
        return "No model has two seeds yet, so the noise between runs is not known."
    count = sum(len(values) > 1 for values in samples.by_variant.values())
    return (
        f"Two runs of one model differ by their seed (first weights, order of the data). Over the "
        f"{count} models with more than one seed, one run's loss has a standard deviation of "
        f"{noise:.4f} nats ({math.expm1(noise):.2%} of perplexity); a difference is called beyond "
        "noise from two standard errors on."
    )


def _paper_table() -> str:
    rows = [
        [name, f"{active} M", f"{total} M", f"{c4:.3f}", f"{wiki:.3f}"]
        for name, active, total, c4, wiki in TABLE_2
    ]
    return table(["", "active", "total", "C4", "Wikitext-2"], rows)


def _claims(samples: Samples) -> Iterator[Claim]:
    for better, worse in pairwise(FAMILY):
        yield _compared(samples, worse, better, "equal total parameters")
    yield _compared(samples, "memoryllm", "base", "equal total parameters")
    yield _compared(samples, "base-active-flex-3", "flex-3", "equal active parameters")
    yield _compared(samples, "base-active", "memoryllm", "equal active parameters")


def _compared(samples: Samples, worse: str, better: str, where: str) -> Claim:
    paper = f"{_name(better)} better than {_name(worse)} at {where}"
    if not {worse, better} <= samples.by_variant.keys():
        return Claim(paper, MISSING, "-")
    found, error = samples.difference(worse, better)
    spread = "" if error is None else f", standard error {error:.4f} nats"
    here = f"{_name(worse)} {math.expm1(found):+.1%} in perplexity ({found:+.4f} nats{spread})"
    return Claim(paper, here, samples.is_larger(worse, better))


def _name(variant: str) -> str:
    return "Base" if variant.startswith("base") else VARIANTS[variant]


def _by_active(family: Entries, samples: Samples) -> str:
    """Every run a dot over its active parameters; hollow ones have fewer in all."""
    runs = list(family.values())
    title, bottom, top = "Perplexity by active parameters", 340, 48
    x = spanning([run["model"]["active"] / 1e6 for run in runs], 64, 700)
    y = spanning([_perplexity(run) for run in runs], bottom, top)
    parts = frame(title, (x, y), ("active parameters, millions", "perplexity, texts together"))
    most = max(run["model"]["total"] for run in runs)
    labels = []
    for run in runs:
        at = (x.place(run["model"]["active"] / 1e6), y.place(_perplexity(run)))
        fewer = run["model"]["total"] < 0.9 * most
        words = f"{VARIANTS[run['variant']]}, seed {run['seed']}: {_perplexity(run):.2f}"
        parts.append(dot(*at, COLOUR[run["variant"]], hollow=fewer, words=words))
    for variant in samples.by_variant:
        run = next(each for each in runs if each["variant"] == variant)
        at = (x.place(run["model"]["active"] / 1e6), y.place(math.exp(samples.mean(variant))))
        labels.append((*at, VARIANTS[variant]))
    parts += beside(labels, Box(66, 32, 760, bottom))
    return picture(760, 400, title, parts, alone=True)


def _perplexity(run: Mapping[str, Any]) -> float:
    found: float = run["figures"]["texts"]["together"]["perplexity"]
    return found


def _curves(family: Entries) -> str:
    lines = []
    for variant, words in VARIANTS.items():
        runs = [each for each in family.values() if each["variant"] == variant]
        if runs:
            training = min(runs, key=lambda each: each["seed"])["figures"]["training"]
            both = zip(training["tokens"], training["loss"], strict=True)
            points = [(tokens / 1e6, loss) for tokens, loss in both if tokens >= _FIRST_TOKENS]
            lines.append(Line(words, points, COLOUR[variant]))
    names = (TOKENS, "training loss, nats per token")
    return line_chart("Training", names, lines, alone=True)
