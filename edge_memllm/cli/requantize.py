"""``edge-memllm requantize``: an artifact in, the same with its table in another codec out."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.export import mixed_line, record_size
from edge_memllm.cli.options import add_command, add_json, add_targets, target
from edge_memllm.cli.output import byte_count, read_text, table, write_json
from edge_memllm.errors import missing_extra

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm_export import RequantizeReport

_DESCRIPTION = """\
Write an artifact once more with its table in another codec. Neither the checkpoint nor torch is
needed. An f16 or f32 table is the best source: rows of a quantised one keep the error they have.
The graph stays as it is, but for the part that takes in the rows where the new codec is fed in
another form. The result is compared with the source before it appears."""

_EXAMPLES = """\
  edge-memllm requantize artifact small --table-codec int4
  edge-memllm requantize artifact smaller --table-codec int3 --table-search
  edge-memllm requantize full fitting --target-size 1.5GB --table-text texts.txt"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "requantize",
        execute,
        summary="store an artifact's table in another codec",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    parser.add_argument("out", type=Path, metavar="OUT", help="the artifact to make")
    stored = parser.add_mutually_exclusive_group(required=True)
    stored.add_argument(
        "--table-codec",
        metavar="CODEC",
        help="how the new table stores its rows; docs/codecs.md lists them",
    )
    add_targets(stored)
    parser.add_argument(
        "--table-search",
        action="store_true",
        help="try several scales for each group of values: slower, a little more exact",
    )
    parser.add_argument(
        "--table-text",
        type=Path,
        metavar="FILE",
        help="codecs that learn (codebook, lowrank) count each token as often as this text has it "
        "(default: all tokens once); for --bits and --target-size, a text like those the model is "
        "for (default: prose that comes along)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the artifact in OUT")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from edge_memllm_export import requantize
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "onnx_ir", "export") from error
    from edge_memllm.cli.output import StageBars
    from edge_memllm.hub import artifact_folder

    text = arguments.table_text
    with StageBars() as bars:
        report = requantize(
            artifact_folder(arguments.artifact),
            arguments.out,
            table_codec=arguments.table_codec,
            table_target=target(arguments),
            table_search=arguments.table_search,
            table_text=None if text is None else read_text(text),
            overwrite=arguments.overwrite,
            progress=bars,
        )
    if arguments.json:
        write_json(as_dict(report))
    else:
        print(page(report))
    return 0


def as_dict(report: RequantizeReport) -> dict[str, Any]:
    """The report as a dict for JSON."""
    return {**asdict(report), "path": str(report.path)}


def page(report: RequantizeReport) -> str:
    """The report as people read it."""
    stored = report.manifest.table
    size = byte_count(report.manifest.files[stored.file].bytes)
    rows = [
        ("artifact", str(report.path)),
        ("table", f"{stored.codec}, {size}, {record_size(stored)} per token"),
        ("graph", "rows taken in another way" if report.graph_rewired else "as it was"),
        (
            "compared",
            (
                f"mean KL divergence {report.mean_kl:.4f} nats to the source over "
                f"{report.compared_tokens} tokens"
            ),
        ),
    ]
    if report.mixed is not None:
        rows.append(("mixed", mixed_line(report.mixed)))
    if not report.faithful_source:
        rows.append(
            ("note", f"made from {report.source_codec}: the error of that codec stays in the rows")
        )
    return table(rows)
