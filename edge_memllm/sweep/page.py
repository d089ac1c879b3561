"""The report of a sweep: one HTML page that needs nothing else, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from edge_memllm.drawing import STYLE
from edge_memllm.sweep.figures import columns
from edge_memllm.sweep.plots import (
    error_by_frequency,
    error_by_layer,
    size_against_divergence,
    size_against_perplexity,
)

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
