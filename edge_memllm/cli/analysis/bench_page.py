"""The report of ``bench`` as people read it: variants side by side, one table per context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edge_memllm.cli.output import byte_count, number, table

Cell = dict[str, Any]
_NOTHING = "-"
_BUSY = 0.5  # processors that others keep busy
_COLD_LEFT = 0.01  # share of the table's pages; a cold one should leave none


def page(report: dict[str, Any]) -> str:
    """All of the report."""
    contexts = list(dict.fromkeys(cell["context"] for cell in report["variants"]))
    parts = [_context(report["variants"], context) for context in contexts]
    parts += filter(None, ["\n".join(_comparisons(report)), "\n".join(_notes(report))])
    parts.append(table(list(_machine(report))))
    return "\n\n".join(parts)


def _context(variants: Sequence[Cell], context: int) -> str:
    cells = [cell for cell in variants if cell["context"] == context]
    head = (f"{number(context)} + {cells[0]['new_tokens']} tokens", *(c["name"] for c in cells))
    rows = [(name, *map(shown, cells)) for name, shown in _ROWS]
    return table([head, *(row for row in rows if set(row[1:]) != {_NOTHING})])


def _spread(key: str) -> Callable[[Cell], str]:
    def shown(cell: Cell) -> str:
        low, high = cell[key]
        return f"{_figure(low)} to {_figure(high)}"

    return shown


def _speed(key: str) -> Callable[[Cell], str]:
    return lambda cell: _figure(cell[key])


def _figure(value: float) -> str:
    return number(value) if value >= 1000 else f"{value:.1f}"


def _of_resident(speed: str) -> Callable[[Cell], str]:
    def shown(cell: Cell) -> str:
        ratios = cell["to_resident"]
        return _NOTHING if ratios is None else str(ratios[speed]["text"])

    return shown


def _of_limit(cell: Cell) -> str:
    line = cell["roofline"]
    if line is None:
        return _NOTHING
    return f"{line['ratio']:.2f} of {_figure(line['limit_tokens_per_second'])}"


def _reading(key: str) -> Callable[[Cell], str]:
    def shown(cell: Cell) -> str:
        reading = cell["reading"]
        if reading is None:
            return _NOTHING
        return f"{reading[key]['ratio']:.2f}x"

    return shown


def _record(cell: Cell) -> str:
    reading = cell["reading"]
    return _NOTHING if reading is None else _duration(reading["record_seconds"])


def _rate(cell: Cell) -> str:
    reading = cell["reading"]
    return _NOTHING if reading is None else f"{byte_count(reading['bytes_per_second'])}/s"


def _bytes(key: str) -> Callable[[Cell], str]:
    return lambda cell: _NOTHING if cell[key] is None else byte_count(cell[key])


def _share(key: str) -> Callable[[Cell], str]:
    return lambda cell: _NOTHING if cell[key] is None else f"{cell[key]:.2%}"


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


_ROWS: tuple[tuple[str, Callable[[Cell], str]], ...] = (
    ("decode, tokens/s", _speed("decode_tokens_per_second")),
    ("  middle half", _spread("decode_quartiles")),
    ("  to resident", _of_resident("decode")),
    ("  share of the limit", _of_limit),
    ("  slowest of 20 steps", lambda cell: _duration(cell["step_seconds"]["p95"])),
    ("prefill, tokens/s", _speed("prefill_tokens_per_second")),
    ("  middle half", _spread("prefill_quartiles")),
    ("  to resident", _of_resident("prefill")),
    ("first token after", lambda cell: _duration(cell["time_to_first_token_seconds"])),
    ("  waited for records", lambda cell: _duration(cell["record_wait_seconds"])),
    ("table, bytes per token", _bytes("table_bytes_read_per_token")),
    ("  reads per new token", lambda cell: f"{cell['reads_per_new_token']:.2f}"),
    ("  share of it read", _share("table_share_read")),
    ("  in the page cache", _share("table_cached_share")),
    ("one record alone", _record),
    ("  to the device's time", _reading("record_of_device")),
    ("many records at once", _rate),
    ("  to the device's rate", _reading("rate_of_device")),
    ("memory of its own", _bytes("rss_anon_bytes")),
    ("  of mapped files", _bytes("rss_file_bytes")),
    ("  both, at most", _bytes("peak_rss_bytes")),
    ("loaded in", lambda cell: _duration(cell["load_seconds"])),
    ("drafts accepted", _share("acceptance")),
)


def _comparisons(report: dict[str, Any]) -> Iterator[str]:
    for name, side in report.get("compared", {}).items():
        yield f"{name} is {side}"
    for each in report["comparisons"]:
        for speed in ("decode", "prefill"):
            ratio = each[speed]
            yield (
                f"{speed} at {number(each['context'])}: {each['name']} / {each['against']} = "
                f"{ratio['text']}, {ratio['verdict']}"
            )


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """What must be said of the figures above."""
    load = report["environment"]["load_average"]
    if load is not None and load > _BUSY:
        yield (
            f"NOT QUIET: the load average was {load:.1f} before the run. Other programs took part "
            "of the processor and of the memory's bandwidth."
        )
    for group in report["identity"]:
        names = ", ".join(group["variants"])
        if not group["identical"]:
            yield f"outputs: DIFFERENT among {names}"
        elif len(group["variants"]) > 1:
            yield f"outputs: identical, bit for bit, among {names}"
    for cell in report["variants"]:
        share = cell["table_cached_share"]
        if cell["cache"] == "cold" and share is not None and share > _COLD_LEFT:
            yield (
                f"{cell['name']}: NOT COLD, {share:.0%} of the table stayed in the page cache "
                "(it lies in memory, or another program maps it)."
            )


def _machine(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Where and how it was measured."""
    where = report["environment"]
    trials = f"{report['repeats']} rounds, medians; prompts of {report['prompts']}"
    yield "measured", trials
    yield "machine", f"{report['device']}, {where['processor']}, {where['physical_cores']} cores"
    for threads, found in report["memory_bandwidth"]["threads"].items():
        yield "memory", _bandwidth(threads, found)
    for text in dict.fromkeys(map(_step, report["variants"])):
        yield "a step reads", text
    for storage in report["storage"]:
        yield "storage", _storage(storage)


def _bandwidth(threads: str, found: dict[str, Any]) -> str:
    rate, best = found["bytes_per_second"], found["best_bytes_per_second"]
    who = "1 thread reads" if threads == "1" else f"{threads} threads read"
    return f"{who} {byte_count(rate)}/s, {byte_count(best)}/s at best ({found['method']})"


def _step(cell: Cell) -> str:
    line = cell["roofline"]
    if line is None:
        return f"not counted on {cell['device']}"
    return (
        f"{byte_count(line['weight_bytes'])} of weights, and at {number(cell['context'])} tokens "
        f"{byte_count(line['kv_bytes'])} of keys and values"
    )


def _storage(storage: dict[str, Any]) -> str:
    names = (storage["model"], storage["driver"], storage["file_system"])
    kind = ", ".join(name for name in names if name) or "unknown"
    records = storage["records"]
    if "not_measured" in records:
        return f"{kind}; not measured: {records['not_measured']}"
    return (
        f"{kind}; one record in {_duration(records['single_seconds'])}, "
        f"many at {byte_count(records['bytes_per_second'])}/s"
    )
