"""The perplexity of trained runs: the family at equal sizes, trained for longer, and changed.

The noise between seeds is pooled over all models with more than one: with two seeds each, one model
alone would tell next to nothing about its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.paper.layout import (
    COLOUR,
    FAMILY,
    MISSING,
    TABLE_2,
    TOKENS,
    VARIANTS,
    Claim,
    Entries,
    Section,
    image,
    table,
)
from benchmarks.paper.store import CHANGES, FORMER, FORMER_COMMIT, WANTED
from edge_memllm.svg import Box, Line, beside, dot, frame, line_chart, picture, spanning

# Student's t, two-sided 95 %, by degrees of freedom; the last is for more of them as well.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Samples:
    """One figure of every seed, by model."""

    by_variant: Mapping[str, Sequence[float]]

    def mean(self, variant: str) -> float:
        """Return the mean over the seeds of a model."""
        return math.fsum(self.by_variant[variant]) / len(self.by_variant[variant])

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the noise: seeds beyond the first of each model."""
        return sum(len(values) - 1 for values in self.by_variant.values())

    @property
    def critical(self) -> float:
        """Standard errors that a difference must exceed, either way, to be beyond noise."""
        return _T[min(self.degrees, len(_T)) - 1]

    def noise(self) -> float | None:
        """Return the standard deviation of one run, None while no model has two seeds."""
        squares = 0.0
        for variant, values in self.by_variant.items():
            squares += math.fsum((value - self.mean(variant)) ** 2 for value in values)
        return math.sqrt(squares / self.degrees) if self.degrees else None

    def difference(self, variant: str, other: str) -> tuple[float, float | None]:
        """Return how much larger the figure of `variant` is, and the standard error of that."""
        noise, counts = self.noise(), [len(self.by_variant[each]) for each in (variant, other)]
        error = None if noise is None else noise * math.sqrt(sum(1 / count for count in counts))
        return self.mean(variant) - self.mean(other), error

    def is_larger(self, variant: str, other: str) -> str:
        """Return the verdict on whether the figure of `variant` is the larger one, in words.

        Two-sided: what is beyond noise the other way is said to be so.
        """
        found, error = self.difference(variant, other)
        if error is None:
            return f"{'yes' if found > 0 else 'no'}, in one run each"
        if abs(found) <= self.critical * error:
            return "cannot be told"
        return "yes" if found > 0 else "no, the reverse"


# (tokens, training loss less that of Base), by model.
Gaps = Mapping[str, Sequence[tuple[float, float]]]

_RECORDS = 3  # of the training, for one figure


def gaps_to_base(entries: Entries, kind: str = "") -> Gaps:
    """Return the gaps of models with a Base of the same seed, length and kind of training.

    `kind` is what follows a model's name in the names of its runs. Of several seeds, the first.
    """
    found = {}
    for run in sorted(entries.values(), key=lambda each: -each["seed"]):
        variant = run["variant"].removesuffix(kind)
        base = entries.get(f"base{kind}-s{run['seed']}")
        if run["variant"] != variant + kind or variant not in FAMILY[1:] or base is None:
            continue
        training, other = run["figures"]["training"], base["figures"]["training"]
        if training["tokens"] == other["tokens"]:
            points = zip(training["tokens"], training["loss"], other["loss"], strict=True)
            found[variant] = [(tokens, a - b) for tokens, a, b in points]
    return {variant: found[variant] for variant in FAMILY if variant in found}


def gap_words(gaps: Gaps) -> str:
    """Say how far MemoryLLM is from Base at a quarter, half and the end of the training."""
    if "memoryllm" not in gaps:
        return f"MemoryLLM against Base along the training: {MISSING}."
    found = gaps["memoryllm"]
    parts = []
    for share in (1 / 4, 1 / 2, 1):
        end = max(1, round(len(found) * share))
        near = [gap for _, gap in found[max(0, end - _RECORDS) : end]]
        parts.append(f"{sum(near) / len(near):+.3f} at {found[end - 1][0] / 1e6:.1f} M")
    return (
        "Training loss less that of Base of the same seed, which saw the same batches. MemoryLLM, "
        f"nats, means of {_RECORDS} records: {', '.join(parts)} tokens; below zero it is ahead. "
        "The paper sees it behind, by less and less, between 25 and 150 B tokens."
    )


def gap_chart(gaps: Gaps) -> str:
    """Return the picture of all gaps, Base as the line at zero."""
    base = [(tokens, 0.0) for tokens, _ in next(iter(gaps.values()))]
    lines = [
        Line(VARIANTS[variant], [(tokens / 1e6, gap) for tokens, gap in points], COLOUR[variant])
        for variant, points in {"base": base, **gaps}.items()
    ]
    names = (TOKENS, "training loss less that of Base, nats")
    return line_chart("Against Base", names, lines, alone=True)


# What is read of the held-out novels lies in the first of them: see `judging`.
_TEXTS = {
    "Wikipedia": "Wikipedia",
    "novels": "half a novel",
    "Wikitext-2": "Wikitext-2",
    "together": "together",
}
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
        _family_table(family),
        _noise_words(samples),
        _other_noise(losses(family, "Wikitext-2"), samples),
        image("paper-active.svg", "Perplexity by active parameters, one dot for each run."),
        image("paper-curves.svg", "Training loss by tokens, one line for each model."),
    ]
    if gaps := gaps_to_base(family):
        pictures["paper-gap.svg"] = gap_chart(gaps)
        parts.append(image("paper-gap.svg", "Training loss less that of Base, by tokens."))
    parts += [gap_words(gaps), "The paper's Table 2, 50 B tokens of C4:", _published_table()]
    return Section(
        title, "\n\n".join(parts), tuple(_family_claims(samples)), pictures, "perplexity"
    )


def losses(entries: Entries, text: str = "together") -> Samples:
    """Return nats per token on a text, those of the trained kinds together, by model."""
    found: dict[str, list[float]] = {}
    for each in entries.values():
        loss = each["figures"]["texts"][text]["nll_per_token"]
        found.setdefault(each["variant"], []).append(loss)
    return Samples(found)


def _family_table(family: Entries) -> str:
    head = ["model", "active", "total", "seed", *_TEXTS.values(), "bits per byte", "command"]
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


def _noise_words(samples: Samples) -> str:
    noise = samples.noise()
    if noise is None:
        return "No model has two seeds yet, so the noise between runs is not known."
    count = sum(len(values) > 1 for values in samples.by_variant.values())
    return (
        "Two runs of one model differ by their seed (first weights, order of the data). Pooled "
        f"over the {count} models with more than one, as if all had the same noise, one run's loss "
        f"has a standard deviation of {noise:.4f} nats ({math.expm1(noise):.2%} of perplexity). "
        f"That rests on {samples.degrees} degrees of freedom, so a difference is called beyond "
        f"noise only from {samples.critical:.2f} standard errors on (Student's t, two-sided, 95 %, "
        "each comparison by itself). It is the noise of training alone: all runs were judged on "
        "the same text, and what other text would say is not in it."
    )


def _other_noise(other: Samples, samples: Samples) -> str:
    """Say what the text of another kind is good for."""
    noise, usual = other.noise(), samples.noise()
    if noise is None or usual is None:
        return "What Wikitext-2's column is worth is not known either."
    return (
        f"On Wikitext-2, which none of them learned from, it is {noise:.4f} nats, "
        f"{noise / usual:.0f} times as much: that column is given because the paper has it, and no "
        "comparison is drawn."
    )


def _published_table() -> str:
    rows = [
        [name, f"{active} M", f"{total} M", f"{c4:.3f}", f"{wiki:.3f}"]
        for name, active, total, c4, wiki in TABLE_2
    ]
    return table(["", "active", "total", "C4", "Wikitext-2"], rows)


def _family_claims(samples: Samples) -> Iterator[Claim]:
    for better, worse in pairwise(FAMILY):
        yield _compared(samples, worse, better, "equal total parameters")
    yield _compared(samples, "memoryllm", "base", "equal total parameters")
    yield _compared(samples, "base-active-flex-3", "flex-3", "equal active parameters")
    yield _compared(samples, "base-active", "memoryllm", "equal active parameters")


def _compared(samples: Samples, worse: str, better: str, where: str) -> Claim:
    paper = f"{display_name(better)} better than {display_name(worse)} at {where}"
    if not {worse, better} <= samples.by_variant.keys():
        return Claim(paper, MISSING, "-")
    found, error = samples.difference(worse, better)
    nats = f"{found:+.4f} nats"
    if error is not None:
        nats = f"{found:+.4f} ± {error:.4f} nats, t = {found / error:+.1f}"
    here = f"{display_name(worse)} {math.expm1(found):+.1%} in perplexity ({nats})"
    return Claim(paper, here, samples.is_larger(worse, better))


def display_name(variant: str) -> str:
    """Return what claims call a model: Bases of other sizes are Base as well."""
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


LONGER_KIND = "-long"
_LONGER_TITLE = "Trained for longer"
_LONGER = """\
The same models, data and settings with more steps, over which the learning rate falls; one seed
each, so no noise is known at this length."""
_NO_SINGLE_BUDGET = """\
The smaller Bases of equal active size were not trained for longer: the paper's pattern, worse at
equal total and better at equal active parameters, is found at this width half at one budget and
half at another. [All models at one budget](#one-budget-for-both-comparisons) are narrower."""
_BASE_LEADS = "Base better than MemoryLLM at equal total parameters, trained for longer"


def longer_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `perplexity`."""
    runs = {
        name: entries[f"{name}{LONGER_KIND}-s1"]
        for name in VARIANTS
        if f"{name}{LONGER_KIND}-s1" in entries
    }
    if not runs:
        return Section(_LONGER_TITLE, f"{MISSING}.", (Claim(_BASE_LEADS, MISSING, "-"),))
    parts, pictures = [_LONGER], {}
    if "base-active" not in runs:
        parts.append(_NO_SINGLE_BUDGET)
    parts.append(_longer_table(runs, entries))
    if gaps := gaps_to_base(entries, LONGER_KIND):
        pictures["paper-longer.svg"] = gap_chart(gaps)
        parts.append(image("paper-longer.svg", "Training loss less that of Base, by tokens."))
        parts.append(gap_words(gaps))
    return Section(
        _LONGER_TITLE, "\n\n".join(parts), tuple(_longer_claims(runs)), pictures, "perplexity"
    )


def _longer_table(runs: Entries, entries: Entries) -> str:
    head = ["model", "million tokens", "perplexity", "of the shorter training", "command"]
    rows = []
    for variant, run in runs.items():
        short = entries.get(f"{variant}-s1")
        rows.append(
            [
                VARIANTS[variant],
                f"{run['figures']['tokens_seen'] / 1e6:.1f}",
                f"{_perplexity(run):.2f}",
                MISSING if short is None else f"{_perplexity(short):.2f}",
                f"`{_longer_command(variant, run)}`",
            ]
        )
    return table(head, rows)


def _longer_command(variant: str, run: Mapping[str, Any]) -> str:
    settings = run["figures"]["training"]["settings"]
    words = training_command(variant, 1, f"{variant}{LONGER_KIND}")
    return " ".join([words, *(f"--set training.{name}={settings[name]}" for name in settings)])


def _longer_claims(runs: Entries) -> Iterator[Claim]:
    if not {"base", "memoryllm"} <= runs.keys():
        yield Claim(_BASE_LEADS, MISSING, "-")
        return
    found = math.log(_perplexity(runs["memoryllm"]) / _perplexity(runs["base"]))
    words = f"MemoryLLM {math.expm1(found):+.1%} in perplexity ({found:+.4f} nats)"
    yield Claim(_BASE_LEADS, words, f"{'yes' if found > 0 else 'no'}, in one run each")
    for worse, better in (("base-active-flex-3", "flex-3"), ("base-active", "memoryllm")):
        if {worse, better} <= runs.keys():
            samples = losses({name: {**runs[name], "variant": name} for name in (worse, better)})
            yield _compared(samples, worse, better, "equal active parameters, trained for longer")


_ABLATION = "abl-"
_PLAIN = {0: "memoryllm", 1: "flex-1", 2: "flex-2", 3: "flex-3"}
_ABLATIONS = """\
Same data, same order, same number of steps, one run each. Noise is that of one run above, and a
difference between two single runs is beyond it as a difference above is."""


def ablations_section(entries: Entries) -> Section:
    """Return the section from the entries of the measurement `perplexity`."""
    title = "Changes to the network"
    runs = [each for each in entries.values() if each["variant"].startswith(_ABLATION)]
    done = {words for run in runs for words in run["model"]["changes"]}
    missing = "; ".join(words for words in WANTED if words not in done)
    left = [f"{MISSING[0].upper()}{MISSING[1:]}: {missing}."] if missing else []
    if not runs:
        return Section(title, left[0])
    head = ["change", "against", "seed", "perplexity", "without it", "difference, nats"]
    head += ["beyond noise", "parameters in the layers", "table rows of a token", "trained with"]
    samples = losses(entries)
    rows = [_ablation_row(run, entries, samples) for run in runs]
    text = "\n\n".join([_ABLATIONS, table(head, rows), *left])
    return Section(title, text, measured="perplexity")


def _ablation_row(run: Mapping[str, Any], entries: Entries, samples: Samples) -> list[str]:
    plain = _PLAIN[run["model"]["beta"]]
    words = "; ".join(run["model"]["changes"]) or run["variant"].removeprefix(_ABLATION)
    start = [words, VARIANTS[plain], str(run["seed"]), f"{_together(run)['perplexity']:.2f}"]
    size = [f"{run['model']['total'] / 1e6:.2f} M", str(run["model"]["memory_rows"])]
    former = set(FORMER).intersection(run["model"]["changes"])
    where = f", with commit {FORMER_COMMIT}" if former else ""
    size.append(f"`{_ablation_command(run, plain)}`{where}")
    other = entries.get(f"{plain}-s{run['seed']}")
    if other is None:
        return [*start, MISSING, "-", "-", *size]
    difference = math.log(_together(run)["perplexity"] / _together(other)["perplexity"])
    return [
        *start,
        f"{_together(other)['perplexity']:.2f}",
        f"{difference:+.4f}",
        _beyond(difference, samples),
        *size,
    ]


def _ablation_command(run: Mapping[str, Any], plain: str) -> str:
    """How the run was trained: the model without the changes, and a setting for each of them."""
    command = training_command(plain, run["seed"], run["variant"])
    settings = {words: change for change, words in CHANGES.items()}
    for words in run["model"]["changes"]:
        width = ("memory_intermediate_size", run["model"]["memory_width"])
        field, value = settings.get(words, width)
        command += f" --set model.{field}={value}"
    return command


def _together(run: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run["figures"]["texts"]["together"]
    return found


def _beyond(difference: float, samples: Samples) -> str:
    noise = samples.noise()
    if noise is None:
        return "noise not known"
    if abs(difference) <= samples.critical * math.sqrt(2) * noise:
        return "no"
    return "yes, worse" if difference > 0 else "yes, better"
