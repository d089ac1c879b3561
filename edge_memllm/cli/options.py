"""Options that several commands share, each defined and worded once.

Knows argparse and nothing of the library: turning options into library objects is the
commands' work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeAlias

    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEVICES = ("auto", "cpu", "cuda")
READERS = ("auto", "pread", "ram")
_HELP_WIDTH = 100


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width everywhere, so that the generated document does not vary."""

    def __init__(self, prog: str, **options: Any) -> None:
        options["width"] = _HELP_WIDTH
        super().__init__(prog, max_help_position=32, **options)


def add_command(
    commands: Commands,
    name: str,
    execute: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Register one command; ``execute`` is called with its parsed arguments."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: one object on stdout, and nothing else there."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout and nothing else there",
    )


def add_loading(parser: argparse.ArgumentParser, *, reader: bool = True) -> argparse._ArgumentGroup:
    """Options of ``edge_memllm.load``: where to compute and how to read the table."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the graph runs; auto takes CUDA where it works, else the CPU, and says so "
        "(default: auto)",
    )
    if reader:
        group.add_argument(
            "--reader",
            choices=READERS,
            default="auto",
            help="how the table is read: pread takes each record from storage, ram loads the "
            "whole table first; auto is pread (default: auto)",
        )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="threads of the graph on a CPU (default: one per physical core)",
    )
    return group


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen; what is left out comes from the artifact."""
    group = parser.add_argument_group(
        "sampling", "Left out, a value comes from the artifact's generation_config.json."
    )
    temperature = group.add_mutually_exclusive_group()
    temperature.add_argument(
        "--temperature", type=float, metavar="X", help="0 takes the likeliest token"
    )
    temperature.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    group.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest; 0 is off")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="only the likeliest that together reach X; 1 is off",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="X",
        help="only those with X times the likeliest one's probability; 0 is off",
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1 avoids repeats; 1 is off"
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="same seed, same text (default: drawn, and shown with the statistics)",
    )


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
