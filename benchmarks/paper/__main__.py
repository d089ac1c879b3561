"""The paper in small: train, measure the runs, store the figures, write the page from them.

    python -m benchmarks.paper train RUNS --data DATA [--steps 2100] [--seeds 1,2,3]
    python -m benchmarks.paper texts DATA TEXTS
    python -m benchmarks.paper train RUNS --data TEXTS --narrow [--seeds 1,2]
    python -m benchmarks.paper measure RUNS --data DATA [--only gain,drop]
    python -m benchmarks.paper decode --preset 250m --artifacts FOLDER --cache cold
    python -m benchmarks.paper page [--check]

RUNS holds finished runs as NAME-sSEED, longer ones as NAME-long-sSEED. Only what is missing is
trained or measured, so the same command is given again: trainings go on where they were stopped.
DATA holds the texts and tasks of benchmarks/paper/judging.py, TEXTS fewer to learn from and more to
judge by; narrow runs, NAME-narrow-sSEED, are trained and measured with those.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


def main(words: list[str] | None = None) -> int:
    arguments, more = _parser().parse_known_args(words)
    if more and arguments.command != "decode":
        _parser().error(f"unknown: {' '.join(more)}")
    if arguments.command == "page":
        from benchmarks.paper.page import write_page

        return write_page(check=arguments.check)
    for line in _measure(arguments, more):
        print(line, flush=True)
    return 0


def _measure(arguments: argparse.Namespace, more: list[str]) -> Iterator[str]:
    if arguments.command == "train":
        from benchmarks.paper.training import Length, train_runs

        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        length = Length(arguments.steps, narrow=arguments.narrow)
        return train_runs(arguments.runs, arguments.data, length, seeds)
    if arguments.command == "texts":
        from benchmarks.paper.texts import write_texts

        return write_texts(arguments.data, arguments.out)
    if arguments.command == "decode":
        from benchmarks.paper.measure import measure_decoding

        return measure_decoding(arguments.preset, arguments.artifacts, more)
    from benchmarks.paper.judging import Judge
    from benchmarks.paper.measure import measure_runs

    judge = Judge(arguments.data, arguments.threads)
    return measure_runs(arguments.runs, judge, [name for name in arguments.only.split(",") if name])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what is not finished, or go on with it")
    train.add_argument("runs", type=Path)
    train.add_argument("--data", type=Path, required=True)
    kind = train.add_mutually_exclusive_group()
    kind.add_argument("--steps", type=int, help="longer trainings, in runs of their own names")
    kind.add_argument("--narrow", action="store_true", help="all models, narrower, at one budget")
    train.add_argument("--seeds", default="1", help="with commas between them")
    texts = commands.add_parser("texts", help="write the texts of narrow runs")
    texts.add_argument("data", type=Path)
    texts.add_argument("out", type=Path)
    measure = commands.add_parser("measure", help="judge trained runs, store the figures")
    measure.add_argument("runs", type=Path)
    measure.add_argument("--data", type=Path, required=True)
    measure.add_argument("--threads", type=int, default=1)
    measure.add_argument("--only", default="", help="measurements, with commas between them")
    decode = commands.add_parser("decode", help="speed and memory; more options go to bench")
    decode.add_argument("--preset", default="250m")
    decode.add_argument("--artifacts", type=Path, required=True)
    page = commands.add_parser("page", help="write docs/results/paper.md and its pictures")
    page.add_argument("--check", action="store_true", help="write nothing, only compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
