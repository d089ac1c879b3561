"""``edge-memllm bench``: speed, memory and reads of an artifact, against the machine's limits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.bench_variants import add_variant_options, positive_ints, request
from edge_memllm.cli.options import add_command, add_json, positive_int
from edge_memllm.cli.text import write_json
from edge_memllm.errors import RequestError

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands

_DESCRIPTION = """\
Measure an artifact: prompts of distinct random tokens are read, a fixed number of tokens is
decoded greedily. Every combination of --cache, --reader and --threads is a variant. All of them
are loaded at the same time, each in a process of its own that rests while another is measured,
and take turns round by round, so that what disturbs the machine disturbs all alike. Figures are
medians over the rounds. --cache says where the table's records come from:
  cold      from storage: its pages leave the page cache before every step
  warm      from the page cache: each trial is run once before it is measured
  direct    from storage, past the page cache
  resident  from memory: the whole table is loaded first
With resident among them, the others are also shown as ratios to it. Variants that must compute
the same are held to the same tokens and logits, bit for bit: exit code 1 if they are not.

The machine's limits are measured in the same rounds: reading memory (with as many threads), and
reading records from the device. The roofline is the speed at which memory could deliver the
graph's weights and the keys and values.

--compare A B measures two artifacts, or two settings of one, and tells the ratio A / B with the
interval that holds it in 95 % of resampled rounds. A and B are PATH, PATH:SETTINGS or SETTINGS
(of ARTIFACT); SETTINGS are options without their dashes: threads=1,cache=cold.

--synthetic makes an artifact with random weights of a preset first. Its text is noise, its speed
is that of a trained model of this shape."""

_EXAMPLES = """\
  edge-memllm bench artifact --cache cold,warm,direct,resident
  edge-memllm bench artifact --context 128,1024 --threads 1,2 --repeats 7 --json
  edge-memllm bench artifact --cache cold,direct --reader pread,direct,uring
  edge-memllm bench artifact --compare threads=1 threads=2
  edge-memllm bench --compare artifact other-artifact --context 128,1024
  edge-memllm bench artifact --prompt-file book.txt --speculate 4
  edge-memllm bench --synthetic 250m --beta 8 --out random-250m-dense"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "bench",
        execute,
        summary="measure speed, memory and reads",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "artifact", nargs="?", type=Path, metavar="ARTIFACT", help="an exported model"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="measure the ratio of two variants"
    )
    _add_trials(parser)
    add_json(parser)
    _add_synthetic(parser)
    add_variant_options(parser)


def _add_trials(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        "--prompt-tokens",
        type=positive_ints,
        action="extend",
        metavar="N[,...]",
        help="tokens of the prompt, so the position that decoding starts at (default: 128)",
    )
    parser.add_argument(
        "--new-tokens", type=_at_least_two, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=5, metavar="N", help="rounds (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts")
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="TEXT",
        help="take the prompts from this text instead of distinct random tokens",
    )


def _add_synthetic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("an artifact with random weights")
    group.add_argument("--synthetic", metavar="PRESET", help="micro, tiny, small, 250m, 750m or 1b")
    group.add_argument(
        "--beta", type=int, metavar="N", help="0 MemoryLLM, 1-3 Flex, 8 dense (default: 0)"
    )
    group.add_argument("--out", type=Path, metavar="ARTIFACT", help="where to write it")


def _at_least_two(text: str) -> int:
    """The first token belongs to the prefill; decoding needs another one to be measured."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more")
    return value


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; 1 when outputs that must be the same are not."""
    _check_artifact(arguments)
    if arguments.synthetic is not None:
        from edge_memllm.cli.synthetic import make_synthetic

        make_synthetic(arguments.synthetic, arguments.beta, arguments.out)
        arguments.artifact = arguments.out
    from edge_memllm.benchmark.measuring import measure
    from edge_memllm.cli.bench_page import page
    from edge_memllm.cli.progress import StageBars

    wanted = request(arguments)
    with StageBars() as bars:
        report = measure(wanted, bars)
    if arguments.compare:
        report["compared"] = dict(zip(("A", "B"), arguments.compare, strict=True))
    if arguments.json:
        write_json(report)
    else:
        print(page(report))
    if not report["identical"]:
        print("error: outputs that must be the same differ; see 'identity'.", file=sys.stderr)
        return 1
    return 0


def _check_artifact(arguments: argparse.Namespace) -> None:
    """Raise `RequestError` unless it is clear what to measure."""
    if arguments.seed < 0:
        raise RequestError(f"--seed is {arguments.seed}, expected 0 or more.")
    if arguments.synthetic is not None:
        if arguments.artifact is not None or arguments.out is None:
            raise RequestError("--synthetic needs --out ARTIFACT, and no other ARTIFACT.")
    elif arguments.out is not None or arguments.beta is not None:
        raise RequestError("--out and --beta are for --synthetic PRESET.")
    elif arguments.artifact is None and arguments.compare is None:
        raise RequestError("Give an ARTIFACT, or --synthetic PRESET with --out ARTIFACT.")
