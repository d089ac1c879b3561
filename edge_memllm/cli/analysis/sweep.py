"""``edge-memllm sweep``: many table codecs measured on one model, in one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from edge_memllm.cli.options import Command, Json, TaskOptions, TextOptions
from edge_memllm.cli.output import StageBars, read_text, table, write_json
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.evaluation import read_tasks
from edge_memllm.options import Group
from edge_memllm.sweep import Sweep, SweepRequest, run_sweep
from edge_memllm.sweep.plan import MEASURED
from edge_memllm.sweep.report import columns

_DESCRIPTION = """\
Store an artifact's table in each of several codecs and measure what that saves and costs: size,
error of the rows by layer and by token frequency, perplexity, divergence from the reference,
scores on tasks, and roughly the speed. Writes results.json, results.csv and report.html, a page
with pictures, into the folder of --out.

SOURCE is an artifact with an f16 or f32 table, or a checkpoint, which is exported once with an
f16 table. Each codec's result is stored as soon as it is there; a run that was ended goes on
where it was, and a run with more codecs measures only those. Results that were measured with
other settings are refused, or with --redo measured again."""

_EXAMPLES = """\
  edge-memllm sweep checkpoint --out sweep --codecs f16,int8,int4,nf4,int3 --text valid.txt
  edge-memllm sweep full --out sweep --codecs int8,int4 --text valid.txt --task blimp --limit 50
  edge-memllm sweep full --out mixed --codecs int4,mixed-4.5 --table-text train.txt --text valid.txt
  edge-memllm sweep full --out searched --codecs int4,int3,int2 --search --text valid.txt --keep"""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What may be asked of ``edge-memllm sweep``."""

    request: Annotated[SweepRequest, Group()]
    texts: Annotated[TextOptions, Group(MEASURED)]
    tasks: Annotated[TaskOptions, Group(MEASURED)]
    json: Json = False


def execute(options: SweepOptions) -> int:
    """Run the command; 1 when a codec could not be made."""
    try:
        import onnx_ir as _  # noqa: F401  # what requantising needs; said before any work
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "onnx_ir", "export") from error
    paths = options.texts.text
    request = replace(
        options.request,
        texts=dict(zip(short_names(paths), map(read_text, paths), strict=True)),
        tasks=tuple(read_tasks(options.tasks.task, limit=options.tasks.limit)),
        context=options.texts.context,
        stride=options.texts.stride,
    )
    with StageBars() as bars:
        done = run_sweep(request, bars)
    if options.json:
        write_json(done.summary)
    else:
        print(page(done))
    return 1 if done.failed else 0


def page(done: Sweep) -> str:
    """What was found, as people read it in a terminal."""
    shown = columns(done.summary)
    parts = []
    if done.summary["results"]:
        heads = (
            tuple(each.head for each in shown),
            tuple(each.unit for each in shown),
        )
        parts.append(table([*heads, *zip(*(each.cells for each in shown), strict=True)]))
    if done.skipped:
        parts.append(f"already measured: {', '.join(done.skipped)}")
    if done.summary["left_out"]:
        parts.append(f"measured with other settings: {', '.join(done.summary['left_out'])}")
    parts.extend(f"could not be made: {codec}: {why}" for codec, why in done.failed.items())
    parts.append(f"report: {done.out / 'report.html'}")
    return "\n\n".join(parts)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the end of each path, as much of it as tells them apart.

    Raises `RequestError` for a file that is named twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path, count in Counter(whole).items() if count > 1)
        raise RequestError(f"{twice}: the file is named twice. Name it once.")
    names = [path.name for path in whole]
    for parts in range(2, max((len(path.parts) for path in whole), default=0) + 1):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else "/".join(path.parts[-parts:])
            for name, path in zip(names, whole, strict=True)
        ]
    return names


def interrupted(_: SweepOptions) -> str:
    """Say what Ctrl-C leaves of a sweep."""
    return "Stopped: what was measured is kept. The same command measures the rest."


SWEEP = Command(SweepOptions, execute, _DESCRIPTION, _EXAMPLES, interrupted)
