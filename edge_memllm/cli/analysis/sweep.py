"""``edge-memllm sweep``: many table codecs measured on one model, in one run."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.options import DEVICES, add_command, add_json, add_windows, positive_int
from edge_memllm.cli.output import read_text, table, write_json
from edge_memllm.errors import RequestError, missing_extra

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm.sweep import Sweep

GRAPH_WEIGHTS = ("fp32", "fp16", "int8", "int4")

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


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "sweep",
        execute,
        summary="compare table codecs: size, error, quality, speed",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="an artifact or a checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where everything is written"
    )
    parser.add_argument(
        "--codecs",
        action="extend",
        type=_names,
        required=True,
        metavar="CODEC[,...]",
        help="the table codecs to compare; docs/codecs.md lists them, and mixed-4.5 is mixed "
        "precision with that many bits per value",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try several scales for each group of values, with codecs that can",
    )
    parser.add_argument(
        "--table-text",
        type=Path,
        metavar="FILE",
        help="text that codecs which learn count tokens in and mixed precision is tuned on; not "
        "one of --text (default: all tokens once; for mixed precision, prose that comes along)",
    )
    parser.add_argument(
        "--graph-weights",
        choices=GRAPH_WEIGHTS,
        help="of the artifact that is made of a checkpoint (default: int8, so that the table is "
        "judged and not the graph)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the artifact of each codec")
    parser.add_argument(
        "--redo", action="store_true", help="measure again what has other settings than these"
    )
    _add_measures(parser.add_argument_group("what is measured"))
    add_json(parser)


def _add_measures(group: argparse._ArgumentGroup) -> None:
    add_windows(group)
    group.add_argument(
        "--reference",
        type=Path,
        metavar="ARTIFACT",
        help="what predictions are compared with (default: SOURCE)",
    )
    group.add_argument(
        "--task",
        type=Path,
        action="extend",
        nargs="+",
        metavar="FILE",
        help="JSON-lines files, or folders of .jsonl files, as for eval",
    )
    group.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N items of each task file"
    )
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="where the graph runs (default: auto)"
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the graph on a CPU"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; 1 when a codec could not be made."""
    _check(arguments)
    try:
        import onnx_ir as _  # noqa: F401  # what requantising needs; said before any work
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "onnx_ir", "export") from error
    from edge_memllm.cli.output import StageBars
    from edge_memllm.evaluation import read_tasks
    from edge_memllm.sweep import SweepRequest, run_sweep

    paths = arguments.text or []
    request = SweepRequest(
        source=arguments.source,
        out=arguments.out,
        codecs=tuple(arguments.codecs),
        texts=dict(zip(short_names(paths), map(read_text, paths), strict=True)),
        tasks=tuple(read_tasks(arguments.task or (), limit=arguments.limit)),
        reference=arguments.reference,
        context=arguments.context,
        stride=arguments.stride,
        search=arguments.search,
        table_text=None if arguments.table_text is None else read_text(arguments.table_text),
        graph_weights=arguments.graph_weights,
        device=arguments.device,
        threads=arguments.threads,
        keep=arguments.keep,
        redo=arguments.redo,
    )
    with StageBars() as bars:
        done = run_sweep(request, bars)
    if arguments.json:
        write_json(done.summary)
    else:
        print(page(done))
    return 1 if done.failed else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    for needed, names in (("text", ("context", "stride", "reference")), ("task", ("limit",))):
        for name in names:
            if getattr(arguments, name) is not None and not getattr(arguments, needed):
                raise RequestError(f"--{name} has no effect without --{needed}. Give --{needed}.")


def page(done: Sweep) -> str:
    """What was found, as people read it in a terminal."""
    from edge_memllm.sweep.report import columns

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


def _names(text: str) -> tuple[str, ...]:
    """An argparse type: words with commas between them."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name between its commas")
    return found
