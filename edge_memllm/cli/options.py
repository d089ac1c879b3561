"""Options that several commands share, each defined and worded once.

Knows argparse and nothing of the library: turning options into library objects is the
commands' work.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.output import read_text
from edge_memllm.feeding import PREFILL_CHUNKS

if TYPE_CHECKING:
    from typing import TypeAlias

    from edge_memllm.mixed_precision import Target

    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
    from edge_memllm.modeling.recipe import Recipe


DEVICES = ("auto", "cpu", "cuda")
TABLE_QUALITIES = ("full", "coarse")
READERS = ("auto", "pread", "direct", "uring", "mmap", "ram")
_HELP_WIDTH = 100
_MOST_LAYERS = 1024
_LOADING = (
    "device",
    "reader",
    "threads",
    "prefill_chunk",
    "table_quality",
    "record_cache",
    "hot_text",
    "memory_limit",
    "vram_limit",
    "cuda_graph",
    "packed_cache",
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)")
_FACTORS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4} | {
    "ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}

Sections = dict[str, dict[str, Any]]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width everywhere, so that the generated document does not vary."""

    def __init__(self, prog: str, **options: Any) -> None:
        options["width"] = _HELP_WIDTH
        super().__init__(prog, max_help_position=32, **options)


def add_command(
    commands: Commands,
    name: str,
    execute: Callable[[argparse.Namespace], int] | None,
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Register one command; ``execute`` is called with its parsed arguments.

    A command that only has others below it has None.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    if execute is not None:
        parser.set_defaults(execute=execute)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: one object on stdout, and nothing else there."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout and nothing else there",
    )


def add_loading(
    parser: argparse.ArgumentParser,
    prefill: str = "{cpu}, on CUDA {cuda}".format(**PREFILL_CHUNKS),
) -> argparse._ArgumentGroup:
    """Options of ``edge_memllm.load``; ``loading_keywords`` turns them into its arguments.

    ``prefill`` is what the command takes where --prefill-chunk is left out.
    """
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the graph runs; auto takes CUDA where it works, else the CPU, and says so "
        "(default: auto)",
    )
    group.add_argument(
        "--reader",
        choices=READERS,
        default="auto",
        help="how the table is read; ram loads it whole, auto measures the storage for a moment "
        "and chooses (default: auto)",
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="threads of the graph on a CPU (default: one per physical core)",
    )
    group.add_argument(
        "--prefill-chunk",
        type=positive_int,
        metavar="N",
        help=f"read the prompt N tokens at a time: less takes less memory (default: {prefill})",
    )
    group.add_argument(
        "--table-quality",
        choices=TABLE_QUALITIES,
        default="full",
        help="coarse reads only the front half of the records of a nested8 table: less to read, "
        "values of about 4 bits (default: full)",
    )
    group.add_argument(
        "--record-cache",
        type=byte_size,
        default=0,
        metavar="SIZE",
        help="keep records that were read in this much memory (default: 0, leave it to the "
        "system's page cache)",
    )
    group.add_argument(
        "--hot-text",
        type=Path,
        metavar="FILE",
        help="keep the records of this text's most frequent tokens for good, in at most half of "
        "the record cache",
    )
    group.add_argument(
        "--packed-cache",
        type=Path,
        metavar="DIR",
        help="keep low-bit weights here as this CPU wants them: mapped from there they take no "
        "memory of the process; made on first use, 2.4 times the graph",
    )
    group.add_argument(
        "--overlay",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="change rows of chosen tokens by this overlay (see 'overlay'); may be repeated, each "
        "acts on what those before it made",
    )
    _add_limits(group)
    return group


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--memory-limit",
        type=byte_size,
        metavar="SIZE",
        help="refuse what would need more memory than this, mapped files not counted: at once, or "
        "when a text grows too long (512MB, 1.5GiB)",
    )
    group.add_argument(
        "--vram-limit", type=byte_size, metavar="SIZE", help="the same for the memory of the GPU"
    )
    group.add_argument(
        "--cuda-graph",
        action="store_true",
        help="on CUDA, record a decode step once and replay it",
    )


def loading_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``edge_memllm.load`` that ``add_loading``'s options stand for."""
    keywords = {name: getattr(arguments, name) for name in _LOADING}
    keywords["overlays"] = tuple(arguments.overlay)
    if arguments.hot_text is not None:
        keywords["hot_text"] = read_text(arguments.hot_text)
    return keywords


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


def add_targets(group: argparse._MutuallyExclusiveGroup) -> None:
    """``--bits`` and ``--target-size``; ``target`` makes of them what the library takes."""
    group.add_argument(
        "--bits",
        type=positive_number,
        metavar="BITS",
        help="mixed precision: choose the bits of each layer and class of tokens so that memory "
        "values take this many on average, scales and levels included, such as 4.5",
    )
    group.add_argument(
        "--target-size",
        type=byte_size,
        metavar="SIZE",
        help="mixed precision: the same for a size of the table file, such as 1.5GB",
    )


def target(arguments: argparse.Namespace) -> Target | None:
    """What mixed precision is to come to, if it was asked for."""
    from edge_memllm.mixed_precision import Target

    if arguments.bits is None and arguments.target_size is None:
        return None
    return Target(arguments.bits, arguments.target_size)


def add_windows(group: argparse._ArgumentGroup) -> None:
    """Add --text, and --context and --stride of the windows it is judged in."""
    group.add_argument(
        "--text", type=Path, action="extend", nargs="+", metavar="FILE", help="UTF-8 text files"
    )
    group.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="tokens in a window (default: the model's whole context)",
    )
    group.add_argument(
        "--stride", type=positive_int, metavar="N", help="tokens from window to window (half of it)"
    )


def positive_number(text: str) -> float:
    """An argparse type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def layer_list(text: str) -> tuple[int, ...]:
    """An argparse type: layers and ranges of layers with commas between, as ``0,3-5``."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < _MOST_LAYERS):
            raise argparse.ArgumentTypeError(f"{text!r} are no layers, such as 0,3-5")
        layers += range(int(first), int(last) + 1)
    return tuple(layers)


def byte_size(text: str) -> int:
    """An argparse type: bytes, as ``64000000``, ``64MB`` (decimal) or ``61.1MiB`` (binary)."""
    found = _SIZE.fullmatch(text.strip())
    unit = "" if found is None else found[2].removesuffix("B").replace("K", "k")
    if found is None or unit not in _FACTORS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size such as 512MB, 1.5GiB or 64000000"
        )
    return round(float(found[1]) * _FACTORS[unit])


def add_texts(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --data, whose text is there for `purpose`, and --valid."""
    parser.add_argument(
        "--data", action="extend", nargs="+", metavar="FILE", help=f"text or .jsonl to {purpose}"
    )
    parser.add_argument(
        "--valid", action="extend", nargs="+", metavar="FILE", help="text or .jsonl to evaluate on"
    )


def add_overrides(parser: argparse.ArgumentParser, out: str) -> None:
    """Add --seed, --set and --resume; `out` is what the command calls its folder."""
    parser.add_argument("--seed", type=int, metavar="N", help="of weights and data order")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="replace one value of the recipe; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"continue from the newest checkpoint under {out}"
    )


def apply_options(recipe: Recipe, arguments: argparse.Namespace, given: Sections) -> None:
    """Put the options that were given into the recipe, those of --set last.

    `given` holds, by section and key, what a command has besides the shared options; None is for
    options that were not given.
    """
    shared: Sections = {
        "data": {"train": arguments.data, "valid": arguments.valid},
        "training": {"steps": arguments.steps, "seed": arguments.seed},
    }
    for section, values in {**given, **shared}.items():
        named = {key: value for key, value in values.items() if value is not None}
        recipe.update(section, named, where="command line")
    for assignment in arguments.set:
        recipe.override(assignment)
