"""Draw docs/images/roofline.svg, and write the figures of docs/performance.md.

    python docs/roofline.py [--check]

Both come from docs/results/roofline.json, a report of ``edge-memllm bench --json``. The picture
shows decoding speed by position, beside the speed at which memory could deliver what a step reads.
With --check nothing is written, only compared.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPORT = HERE / "results" / "roofline.json"
PAGE = HERE / "performance.md"
PICTURE = HERE / "images" / "roofline.svg"

_BEGIN, _END = "<!-- figures: python docs/roofline.py -->\n", "<!-- end of figures -->\n"
_COLUMNS = (
    "table,position,decode tokens/s,of the limit,to resident,prefill tokens/s,memory of its own"
)
_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 168, 34, 50
_POINTS = 64  # of a curve
_COLOURS = {"cold": "#2f6fc4", "warm": "#c9651c", "direct": "#3a8f5c", "resident": "#27313d"}
_KINDS = {0: "MemoryLLM", 8: "dense"}
_OTHER = "#8a5fb0"
_APART = 7  # pixels between the marks of one position

Cell = dict[str, Any]
Scale = Callable[[float], float]


def picture(report: dict[str, Any]) -> str:
    """The whole picture as SVG."""
    cells = [cell for cell in report["variants"] if cell["roofline"] is not None]
    last = max(cell["context"] + cell["new_tokens"] for cell in cells)
    models = list({cell["model"]["identity"]: cell for cell in cells}.values())
    highest = max(
        *(_limit(report, cell, 0) for cell in models),
        *(cell["decode_quartiles"][1] for cell in cells),
    )
    across, up = _ticks(last), _ticks(highest)
    x = _scale(0, across[-1], _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, up[-1], _HEIGHT - _BOTTOM, _TOP)
    lines = [*_frame(x, y, across, up)]
    for cell in models:
        lines += _curve(report, cell, x, y, across[-1])
    lines += _marks(cells, x, y)
    lines += _legend(cells)
    return "\n".join([*_head(report), *lines, "</svg>", ""])


def _limit(report: dict[str, Any], cell: Cell, position: float) -> float:
    """Tokens per second that memory allows at a position."""
    line = cell["roofline"]
    bandwidth = report["memory_bandwidth"]["threads"][str(cell["threads"])]["bytes_per_second"]
    per_position = line["kv_bytes"] / (cell["context"] + cell["new_tokens"] / 2)
    return float(bandwidth / (line["weight_bytes"] + per_position * position))


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(highest: float) -> list[float]:
    """Round values from zero to beyond ``highest``, about five of them."""
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= highest / 6)
    return [step * number for number in range(math.ceil(highest / step) + 1)]


def _head(report: dict[str, Any]) -> Iterator[str]:
    where = report["environment"]
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-labelledby="title description" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">"
    )
    yield '<title id="title">Decoding speed and what memory allows</title>'
    yield (
        '<desc id="description">Tokens per second by position in the text, measured with the '
        "table in several states, below a curve: the measured memory bandwidth divided by the "
        "bytes of weights, keys and values that a step reads.</desc>"
    )
    yield (
        "<style>text{font-size:12.5px;fill:#55606d}.name{font-size:14px;font-weight:600;"
        "fill:#27313d}.grid{stroke:#dfe3e8}.limit{fill:none;stroke:#7d8896;stroke-width:2}"
        ".share{stroke-dasharray:5 5;stroke-width:1.4}.end{text-anchor:end}"
        ".middle{text-anchor:middle}</style>"
    )
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>'
    yield f'<text class="name" x="{_LEFT}" y="20">Decoding, tokens per second</text>'
    shown = f"{where['processor']}, {report['threads']} threads, medians of {report['repeats']}"
    yield f'<text class="end" x="{_WIDTH - 12}" y="20">{_plain(shown)}</text>'


def _frame(x: Scale, y: Scale, across: Sequence[float], up: Sequence[float]) -> Iterator[str]:
    end = x(across[-1])
    for value in up:
        yield (
            f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{end:.1f}"/>'
            f'<text class="end" x="{_LEFT - 8}" y="{y(value) + 4:.1f}">{value:g}</text>'
        )
    for value in across:
        yield f'<text class="middle" x="{x(value):.1f}" y="{y(0) + 20:.1f}">{value:g}</text>'
    middle = (x(0) + end) / 2
    yield f'<text class="middle" x="{middle:.1f}" y="{_HEIGHT - 10}">position in the text</text>'


def _curve(report: dict[str, Any], cell: Cell, x: Scale, y: Scale, end: float) -> Iterator[str]:
    """The limit of one model, and four fifths of it."""
    places = [end * point / _POINTS for point in range(_POINTS + 1)]
    for name, share in (("limit", 1.0), ("limit share", 0.8)):
        points = (
            f"{x(place):.1f} {y(share * _limit(report, cell, place)):.1f}" for place in places
        )
        yield f'<path class="{name}" d="M{"L".join(points)}"/>'
        height = y(share * _limit(report, cell, end))
        kind = _KINDS.get(cell["model"]["beta"], "Flex")
        label = f"limit, {kind}" if share == 1 else "0.8 of it"
        yield f'<text x="{x(end) + 6:.1f}" y="{height + 4:.1f}">{label}</text>'


def _marks(cells: Sequence[Cell], x: Scale, y: Scale) -> Iterator[str]:
    """A dot for each median, a line for the middle half of the trials."""
    names = list(dict.fromkeys(cell["name"] for cell in cells))
    for cell in cells:
        shift = (names.index(cell["name"]) - (len(names) - 1) / 2) * _APART
        place = x(cell["context"] + cell["new_tokens"] / 2) + shift
        low, high = (y(each) for each in cell["decode_quartiles"])
        colour, height = _colour(cell), y(cell["decode_tokens_per_second"])
        yield (
            f'<path d="M{place:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{place:.1f}" cy="{height:.1f}" r="4" fill="{colour}"/>'
        )


def _legend(cells: Sequence[Cell]) -> Iterator[str]:
    named = {cell["name"]: cell for cell in cells}
    for place, (name, cell) in enumerate(named.items()):
        height = _TOP + 14 + 20 * place
        left = _WIDTH - _RIGHT + 22
        yield (
            f'<circle cx="{left}" cy="{height - 4}" r="4" fill="{_colour(cell)}"/>'
            f'<text x="{left + 12}" y="{height}">{_plain(name)}</text>'
        )


def _colour(cell: Cell) -> str:
    return _OTHER if cell["model"]["beta"] == 8 else _COLOURS[cell["cache"]]


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def figures(report: dict[str, Any]) -> str:
    """The figures as a table of the page."""
    names = _COLUMNS.split(",")
    rows = [names, ["---"] * len(names), *map(_row, report["variants"])]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{table}\n{_circumstances(report)}\n"


def _row(cell: Cell) -> list[str]:
    ratios, line = cell["to_resident"], cell["roofline"]
    return [
        cell["name"],
        f"{cell['context']:,}",
        f"{cell['decode_tokens_per_second']:.1f}",
        f"{line['ratio']:.2f}",
        "" if ratios is None else ratios["decode"]["text"],
        f"{cell['prefill_tokens_per_second']:.0f}",
        f"{cell['rss_anon_bytes'] / 1e9:.2f} GB",
    ]


def _circumstances(report: dict[str, Any]) -> str:
    where, records = report["environment"], report["storage"][0]["records"]
    memory = report["memory_bandwidth"]["threads"][str(report["threads"])]
    device = ""
    if "single_seconds" in records:
        device = (
            f" The device takes {records['single_seconds'] * 1e6:.0f} us for one record and gives "
            f"{records['bytes_per_second'] / 1e6:.0f} MB/s for many."
        )
    return (
        f"{where['processor']}, {report['threads']} threads, {where['system']}, onnxruntime "
        f"{where['onnxruntime']}; medians of {report['repeats']} rounds, load average "
        f"{where['load_average']:.1f} before the run. Memory gave "
        f"{memory['bytes_per_second'] / 1e9:.1f} GB/s, {memory['best_bytes_per_second'] / 1e9:.1f} "
        f"at best.{device}"
    )


def page_with(report: dict[str, Any], page: str) -> str:
    """The page with these figures between its two marks."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{figures(report)}\n{_END}{after}"


def main(words: Sequence[str]) -> int:
    """Write picture and page, or with ``--check`` return 1 when they are not what they would be."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    wanted = {
        PICTURE: picture(report),
        PAGE: page_with(report, PAGE.read_text(encoding="utf-8")),
    }
    if "--check" not in words:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return 0
    wrong = [path.name for path, text in wanted.items() if path.read_text("utf-8") != text]
    if wrong:
        print(f"{', '.join(wrong)}: not of today, run `python docs/roofline.py`.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
