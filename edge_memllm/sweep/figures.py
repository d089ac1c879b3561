"""The figures of a sweep as one table: a row per codec, for CSV and for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, float | str]

_TASK_FIGURES = ("acc", "acc_norm", "acc_bytes", "perplexity")
_CSV_TASK_KEYS = tuple(f"{name}{end}" for name in _TASK_FIGURES for end in ("", "_stderr"))


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
