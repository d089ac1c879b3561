"""The report of a sweep: one HTML page that needs nothing else, in light and in dark."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from edge_memllm.svg import (
    STYLE,
    Axis,
    Box,
    at_right,
    beside,
    dot,
    frame,
    path,
    picture,
    spanning,
)
from edge_memllm.sweep.measuring import class_name

Result = Mapping[str, Any]

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 736, 48, 376
_LINES_RIGHT = 590  # where lines end that have their names beside them
_MOST_COST = 1.05  # of the best perplexity: what costs more is drawn at the edge
_LEAST_KL = 1e-7  # of a picture: less is rounding

Row = dict[str, float | str]

_TASK_FIGURES = ("acc", "acc_norm", "acc_bytes", "perplexity")
_CSV_TASK_KEYS = tuple(f"{name}{end}" for name in _TASK_FIGURES for end in ("", "_stderr"))

_STYLE = """\
:root{color-scheme:light dark;--ink:#27313d;--soft:#5a6672;--edge:#d5dae0;--paper:#ffffff}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#a3adb9;--edge:#353d47;
--paper:#171b21}}
body{margin:0 auto;max-width:1280px;padding:24px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:24px;margin:0}h2{font-size:18px;margin:36px 0 8px}p{max-width:75ch}
.soft,caption{color:var(--soft)}svg{width:100%;max-width:860px;display:block;margin:16px 0 4px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:13px}th,td{padding:4px 8px;border-bottom:1px solid var(--edge);text-align:right;
white-space:nowrap}th{vertical-align:bottom;white-space:normal}th:first-child,td:first-child{text-align:left;
position:sticky;left:0;background:var(--paper)}th small{display:block;font-weight:400;
color:var(--soft)}.facts td,.facts th{text-align:left;white-space:normal;
overflow-wrap:anywhere;position:static}.failed{color:#c03a3a}
@media(prefers-color-scheme:dark){.failed{color:#f28b8b}}
"""


_MOST_FILES = 8  # named one by one


def size_against_perplexity(results: Sequence[Result], *, alone: bool = False) -> str:
    """Return the picture of perplexity by the size of the table, the Pareto front marked."""
    values = [each["text"]["perplexity"] for each in results]
    limit = min(values) * _MOST_COST
    inside = [value for value in values if value <= limit]
    found = spanning(inside, _BOTTOM, _TOP + 8)
    # The best ones lie close together at the bottom: their names want room there.
    y = replace(found, low=found.low - 0.08 * (found.high - found.low), end=_TOP)
    return _scatter(
        "Size against perplexity",
        results,
        values,
        y,
        "perplexity",
        lambda value: f"{value:.4g}",
        alone,
    )


def size_against_divergence(results: Sequence[Result], *, alone: bool = False) -> str:
    """Return the picture of the divergence from the reference by the size of the table.

    Results that do not differ from the reference are not in it: they have no place on its scale.
    """
    shown = [each for each in results if each["text"]["mean_kl"] > _LEAST_KL]
    values = [each["text"]["mean_kl"] for each in shown]
    y = spanning(values or [1e-3, 1.0], _BOTTOM, _TOP, True)
    title = "Size against divergence from the reference"
    name = "mean KL divergence, nats per token"
    return _scatter(title, shown, values, y, name, lambda value: f"{value:.0e}", alone)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points are not beaten by one that is as good in both and better in one.

    In the order of the first figure; of equal points, all.
    """
    order = sorted(range(len(points)), key=lambda place: points[place])
    front: list[int] = []
    for place in order:
        best = points[front[-1]] if front else None
        if best is None or points[place][1] < best[1] or points[place] == best:
            front.append(place)
    return front


def error_by_layer(results: Sequence[Result]) -> str:
    """Return the picture of the rows' relative error in each layer, one line per codec."""
    count = len(results[0]["rows"]["layers"])
    across = [(float(layer), str(layer)) for layer in _few(count)]
    lines = [[layer["relative_rms"] for layer in each["rows"]["layers"]] for each in results]
    return _lines("Error of the rows by layer", results, lines, across, count, "layer")


def error_by_frequency(results: Sequence[Result]) -> str:
    """Return the picture of the rows' relative error by how often the texts have a token."""
    classes = results[0]["rows"]["classes"]
    across = [
        (float(number), f"{class_name(each)}\n({each['tokens']:,})")
        for number, each in enumerate(classes)
    ]
    lines = [[found["relative_rms"] for found in each["rows"]["classes"]] for each in results]
    name = "times the texts have a token (in brackets: how many such tokens there are)"
    title = "Error of the rows by token frequency"
    return _lines(title, results, lines, across, len(classes), name)


def _scatter(
    title: str,
    results: Sequence[Result],
    values: Sequence[float],
    y: Axis,
    name: str,
    write: Callable[[float], str],
    alone: bool,
) -> str:
    sizes = [each["table"]["payload_bytes"] / 1e6 for each in results]
    x = spanning(sizes or [1.0], _LEFT, _RIGHT)
    # Small tables lie close together: their names want room on the left.
    low = x.low - 0.12 * (x.high - x.low)
    x = Axis(max(0.0, low), x.high, x.start, x.end)
    parts = frame(title, (x, y), ("size of the table, MB", name), write=write)
    # A few bytes more or less are no difference: codecs may share parameters, or have none.
    alike = [float(f"{size:.4g}") for size in sizes]
    front = pareto(list(zip(alike, values, strict=True)))
    on_scale = [place for place in front if values[place] <= y.high]
    parts.append(path([(x.place(sizes[i]), y.place(values[i])) for i in on_scale], "front"))
    points = []
    for place, each in enumerate(results):
        at = (x.place(sizes[place]), y.place(values[place]))
        beyond = values[place] > y.high
        words = f"{each['codec']} ↑ {values[place]:.4g}" if beyond else each["codec"]
        hint = f"{each['codec']}: {sizes[place]:.2f} MB, {values[place]:.5g}"
        parts.append(dot(*at, _colour(each), hollow=place not in front, words=hint))
        points.append((*at, words))
    room = Box(_LEFT + 2, _TOP - 16, _WIDTH, _BOTTOM)
    heading = Box(_LEFT, _TOP - 16, _LEFT + 7 * len(name), _TOP)
    parts.extend(beside(points, room, [heading]))
    return picture(_WIDTH, _HEIGHT, title, parts, alone=alone)


def _lines(
    title: str,
    results: Sequence[Result],
    lines: Sequence[Sequence[float]],
    across: Sequence[tuple[float, str]],
    count: int,
    name: str,
) -> str:
    positive = [value for line in lines for value in line if value > 0]
    y = spanning(positive or [1e-3, 1.0], _BOTTOM, _TOP, True)
    x = Axis(-0.4, count - 0.6, _LEFT, _LINES_RIGHT)
    parts = frame(title, (x, y), (name, "rms error / rms of the rows"), across, _per_cent)
    ends = []
    for each, line in zip(results, lines, strict=True):
        points = [(x.place(place), y.place(value)) for place, value in enumerate(line) if value > 0]
        if not points:
            continue
        colour = _colour(each)
        parts.append(path(points, "line", colour))
        parts.extend(dot(*at, colour) for at in (points if len(points) < 12 else points[-1:]))
        ends.append((points[-1][1], each["codec"], colour))
    parts.extend(at_right(ends, _LINES_RIGHT - 20, _TOP - 4, _BOTTOM + 8))
    return picture(_WIDTH, _HEIGHT, title, parts, alone=False)


def _colour(result: Result) -> int:
    found: int = result["colour"]
    return found


def _per_cent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _few(count: int) -> list[int]:
    """Return layers to name: all of a few, else about ten."""
    step = max(1, math.ceil(count / 10))
    return list(range(0, count, step))


@dataclass(frozen=True, slots=True)
class Column:
    """A column for people: its head, its unit, and how its figures are written."""

    head: str
    unit: str
    cells: tuple[str, ...]


def csv_text(summary: Mapping[str, Any]) -> str:
    """Return results.csv: every figure that is one number, in full precision."""
    rows = [_flat(result) for result in summary["results"]]
    names = dict.fromkeys(name for row in rows for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def columns(summary: Mapping[str, Any]) -> list[Column]:
    """Return the table for people, the codec first; what was not measured has no column."""
    results = summary["results"]
    tables = [each["table"] for each in results]
    total = [each["rows"]["total"] for each in results]
    found = [
        Column("codec", "", tuple(each["codec"] for each in results)),
        Column("table", "MB", tuple(f"{each['payload_bytes'] / 1e6:.2f}" for each in tables)),
        Column("file", "MB", tuple(f"{each['file_bytes'] / 1e6:.2f}" for each in tables)),
        Column("record", "bytes/token", tuple(f"{each['bytes_per_token']:,}" for each in tables)),
        Column("rows", "bits/value", tuple(f"{each['bits_per_value']:.2f}" for each in tables)),
        Column("rms error", "of rows' rms", tuple(f"{each['relative_rms']:.3%}" for each in total)),
        Column("largest error", "", tuple(f"{each['largest']:.3g}" for each in total)),
        Column("1 - cosine", "mean", tuple(f"{1 - each['cosine']:.2e}" for each in total)),
    ]
    texts = [each["text"] for each in results]
    if texts and texts[0] is not None:
        found += _text_columns(texts)
    found += _task_columns(results)
    speeds = tuple(f"{each['decode']['tokens_per_second']:.0f}" for each in results)
    return [*found, Column("decode, rough", "tokens/s", speeds)]


def _text_columns(texts: Sequence[Mapping[str, Any]]) -> list[Column]:
    return [
        Column("perplexity", "", tuple(f"{each['perplexity']:.3f}" for each in texts)),
        Column("change", "", tuple(f"{each['perplexity_increase']:+.2%}" for each in texts)),
        Column("mean KL", "nats", tuple(f"{abs(each['mean_kl']):.2e}" for each in texts)),
        Column("same top token", "", tuple(f"{each['top1_agreement']:.2%}" for each in texts)),
    ]


def _task_columns(results: Sequence[Mapping[str, Any]]) -> list[Column]:
    """One column for each task, or for the mean of a group of tasks."""
    if not results:
        return []
    first = results[0]
    alone = [name for name in first["tasks"] if name.split("/")[0] not in first["groups"]]
    found = []
    for kind, names in (("groups", list(first["groups"])), ("tasks", alone)):
        for name in names:
            cells = tuple(_accuracy(each[kind][name]) for each in results)
            found.append(Column(name, "acc", cells))
    return found


def _accuracy(task: Mapping[str, Any]) -> str:
    error = task.get("acc_stderr")
    return f"{task['acc']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _flat(result: Mapping[str, Any]) -> Row:
    row: Row = {"codec": result["codec"], **result["table"]}
    row |= {f"rows_{name}": value for name, value in result["rows"]["total"].items()}
    for name, text in [("", result["text"]), *result["texts"].items()]:
        start = f"{name}: " if name else ""
        row |= {f"{start}{key}": value for key, value in (text or {}).items()}
    for name, task in [*result["groups"].items(), *result["tasks"].items()]:
        row |= {f"{name}: {key}": task[key] for key in _CSV_TASK_KEYS if task.get(key) is not None}
    decode = result["decode"]
    return row | {"decode_tokens_per_second": decode["tokens_per_second"]}


def report_page(summary: Mapping[str, Any]) -> str:
    """Return the page of what `run_sweep` put together."""
    parts = ["<h1>Table codecs compared</h1>", _subject(summary)]
    if summary["results"]:
        parts += [*_pictures(summary), *_table(summary)]
    parts += [*_failures(summary), *_settings(summary), *_environment(summary)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Table codecs compared</title><style>{_STYLE}{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def coloured(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results that know the number of their colour, the same in all pictures."""
    return [{**each, "colour": number} for number, each in enumerate(results)]


def _subject(summary: Mapping[str, Any]) -> str:
    model = summary["model"]
    return (
        f'<p class="soft">{model["layers"]} layers, width {model["width"]}, '
        f"{model['vocabulary']:,} tokens; graph weights {escape(model['graph_weights'])}; "
        f"rows made from a table in {escape(model['source_codec'])}. Model "
        f"{escape(model['identity'][:19])}.</p>"
    )


def _pictures(summary: Mapping[str, Any]) -> Iterator[str]:
    results = coloured(summary["results"])
    if results[0]["text"] is not None:
        yield "<h2>What a size costs</h2>"
        yield size_against_perplexity(results)
        yield _note(
            "Full dots are on the Pareto front (dashed): no other codec is as small and better. "
            "Size is that of all records without padding, with what a codec stores once for all "
            "tokens. Codecs beyond the scale are drawn at its upper edge, with an arrow and their "
            "figure."
        )
        yield size_against_divergence(results)
        yield _note("Logarithmic. Codecs that do not differ from the reference are not shown.")
    yield "<h2>Where the rows' error is</h2>"
    yield error_by_layer(results)
    if results[0]["rows"]["classes"]:
        yield error_by_frequency(results)
    yield _note("Over the rows of all tokens, each token once; without error there is no line.")


def _table(summary: Mapping[str, Any]) -> Iterator[str]:
    shown = columns(summary)
    heads = "".join(
        f"<th>{escape(each.head)}<small>{escape(each.unit) or '&nbsp;'}</small></th>"
        for each in shown
    )
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in zip(*(each.cells for each in shown), strict=True)
    )
    yield "<h2>All figures</h2>"
    body = f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>"
    yield f'<div class="wide"><table>{body}</table></div>'
    decode = summary["results"][0]["decode"]
    yield _note(
        "table: records without padding; file: with padding, as stored. Errors are those of the "
        "decoded rows against the source's; change, KL and same top token are against the "
        f"reference. Decoding speed is rough: the median of {decode['trials']} texts of "
        f"{decode['new_tokens']} tokens, one right after the other, with whatever else the machine "
        "did; edge-memllm bench measures it with care."
    )


def _failures(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["failed"]:
        yield "<h2>Could not be made</h2>"
        for codec, reason in summary["failed"].items():
            yield f'<p class="failed">{escape(codec)}: {escape(reason)}</p>'
    if summary["left_out"]:
        names = ", ".join(summary["left_out"])
        yield _note(f"Measured with other settings, so not on this page: {names}.")


def _settings(summary: Mapping[str, Any]) -> Iterator[str]:
    settings = summary["settings"]
    rows: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and len(value) > _MOST_FILES:
            rows[name] = f"{len(value)} files, their digests are in results.json"
        elif isinstance(value, dict):
            rows |= {f"{name}: {key}": f"sha256 {digest[:16]}" for key, digest in value.items()}
        else:
            rows[name] = f"sha256 {value[:16]}" if _is_digest(value) else _words(value)
    if summary["results"] and summary["results"][0]["text"] is not None:
        rows["predicted tokens"] = f"{summary['results'][0]['text']['tokens']:,}"
    yield "<h2>Settings</h2>"
    yield _facts(rows)


def _environment(summary: Mapping[str, Any]) -> Iterator[str]:
    if not summary["results"]:
        return
    found: dict[str, list[str]] = {}
    for each in summary["results"]:
        for name, value in each["environment"].items():
            words = f"{value:.1f}" if name == "load_average" and value is not None else str(value)
            found.setdefault(name, []).append(words)
    found["seconds"] = [f"{each['seconds']:.0f}" for each in summary["results"]]
    yield "<h2>Environment</h2>"
    yield _facts(
        {name.replace("_", " "): " / ".join(dict.fromkeys(each)) for name, each in found.items()}
    )


def _facts(rows: Mapping[str, str]) -> str:
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def _note(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "chosen by the machine" if value is None else str(value)
