"""How far the models of the family are from Base along a training, by the losses it recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.paper.page.layout import COLOUR, FAMILY, MISSING, TOKENS, VARIANTS, Entries
from edge_memllm.charts import Line, line_chart

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
