"""Rounds to medians, ratios and a Markdown table. Plain numbers in, text out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.peers.contenders import OURS

Rounds = list[dict[str, Any]]

PREFILL_512 = "prefill_512"
# Workload: tokens of prompt. The decoding ones also time their prompt, which is not reported.
WORKLOADS = {"decode_128": 128, "decode_1024": 1024, PREFILL_512: 512}


def speed(workload: str, run: dict[str, Any], most: float) -> float | None:
    """Tokens per second of one run; None where others took more than the share ``most``."""
    if run["taken_by_others"] > most:
        return None
    if workload == PREFILL_512:
        return float(WORKLOADS[workload] / run["prefill_seconds"])
    return float(len(run["step_seconds"]) / sum(run["step_seconds"]))


def summary(
    loaded: dict[str, Any], rounds: Rounds, ours: Rounds | None, most: float
) -> dict[str, Any]:
    """Medians of one contender over the undisturbed of its runs; None where there are none.

    ``ours`` holds the runs of the same rounds of edge-memllm: the ratio is the median over the
    rounds in which both were undisturbed.
    """
    runs = [each[workload] for each in rounds for workload in WORKLOADS]
    speeds = {w: [speed(w, each[w], most) for each in rounds] for w in WORKLOADS}
    return {
        "speeds": {w: _of([s for s in all_of_them if s]) for w, all_of_them in speeds.items()},
        "ours_against_it": None if ours is None else _ratios(ours, speeds, most),
        "peak_rss_bytes": max(each["peak_rss_bytes"] for each in [loaded, *runs]),
        "anon_bytes": max(each["anon_bytes"] for each in [loaded, *runs]),
        "load_seconds": loaded["load_seconds"],
        "idle_cpu_seconds": max(each["idle_cpu_seconds"] for each in runs),
        "disturbed_runs": sum(each["taken_by_others"] > most for each in runs),
        "settings": loaded["settings"],
    }


def _of(speeds: list[float]) -> dict[str, float] | None:
    if not speeds:
        return None
    return {"median": median(speeds), "least": min(speeds), "most": max(speeds)}


def _ratios(
    ours: Rounds, speeds: dict[str, list[float | None]], most: float
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for workload, theirs in speeds.items():
        mine = [speed(workload, each[workload], most) for each in ours]
        pairs = [a / b for a, b in zip(mine, theirs, strict=True) if a and b]
        found[workload] = median(pairs) if pairs else None
    return found


def table(summaries: dict[str, dict[str, Any]], labels: dict[str, str]) -> str:
    """The summaries as a Markdown table, one line per contender."""
    head = (
        *("", "decode at 128", "decode at 1024", "prefill of 512"),
        *("peak RSS", "anonymous", "load", "runs left out"),
    )
    rows = [
        [
            labels[name],
            *(_speeds(each["speeds"][workload]) for workload in WORKLOADS),
            *(f"{each[key] / 1e9:.2f} GB" for key in ("peak_rss_bytes", "anon_bytes")),
            f"{each['load_seconds']:.1f} s",
            str(each["disturbed_runs"]),
        ]
        for name, each in summaries.items()
    ]
    return markdown(head, rows)


def ratios(summaries: dict[str, dict[str, Any]], labels: dict[str, str]) -> str:
    """How many times as fast edge-memllm is; empty when it did not take part."""
    rows = [
        [labels[name], *(_ratio(each["ours_against_it"][w]) for w in WORKLOADS)]
        for name, each in summaries.items()
        if name != OURS and each["ours_against_it"]
    ]
    if not rows:
        return ""
    head = (f"{labels[OURS]}, against", "decode at 128", "decode at 1024", "prefill of 512")
    return markdown(head, rows)


def as_json(report: dict[str, Any]) -> str:
    """The whole report."""
    return json.dumps(report, indent=1) + "\n"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _speeds(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.1f} ({found['least']:.1f}-{found['most']:.1f})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
