"""A real model, SmolLM2-135M-Instruct from its GGUF file, through every door.

    python -m benchmarks.real check [EXPORT OPTIONS]
    python -m benchmarks.real compare --text TEXT [--rounds 5] [--artifact DIR]
    python -m benchmarks.real copy --text TEXT
    python -m benchmarks.real json [--artifact DIR]
    python -m benchmarks.real page [--check]

``check`` is what ``make real`` runs: it fetches the file, exports it, asks it, asks it by its
name, and compares it with its float weights in transformers. ``compare`` holds it beside llama.cpp
on the same file: quality, speed, memory. ``copy`` does so with the quality of a rescaled copy in
few bits. ``json`` counts replies in JSON that end by themselves. All store their figures in
docs/results/real-models.json, and write the page of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    from benchmarks.real.model_file import NoModelError, model_file
    from benchmarks.real.page import write_page

    parser = _parser()
    arguments, more = parser.parse_known_args(words)
    if more and arguments.command != "check":
        parser.error(f"unknown: {' '.join(more)}")
    if arguments.command == "page":
        return write_page(check=arguments.check)
    start = time.perf_counter()
    try:
        file = model_file(arguments.folder)
    except NoModelError as error:
        print(f"real: {error}", file=sys.stderr)
        return 1
    if arguments.command == "check":
        wrong = _check(file, arguments, more)
        outcome = f"{wrong} wrong" if wrong else "all holds"
    else:
        wrong, outcome = 0, "stored"
        for line in _compare(file, arguments):
            print(f"real: {line}", file=sys.stderr, flush=True)
        write_page(check=False)
    print(f"real: {outcome}, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


def _check(file: Path, arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Print findings, and return how many do not hold."""
    from benchmarks.real.check import check

    wrong = 0
    for finding in check(file, arguments.folder, options, arguments.threads):
        wrong += not finding.holds
        print(f"{'ok    ' if finding.holds else 'WRONG '} {finding.words}", flush=True)
    return wrong


def _compare(file: Path, arguments: argparse.Namespace) -> Iterator[str]:
    from benchmarks.real.comparison import Judge, compare_copy, compare_file
    from benchmarks.real.endings import measure_endings

    if arguments.command == "json":
        return measure_endings(file, arguments.folder, arguments.threads, arguments.artifact)
    judge = Judge(arguments.text, arguments.windows, arguments.threads)
    if arguments.command == "copy":
        return compare_copy(file, arguments.folder, judge)
    return compare_file(file, arguments.folder, judge, arguments.rounds, arguments.artifact)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="whether the model holds; other options: export's")
    compare = commands.add_parser("compare", help="beside llama.cpp, on the file as it is")
    copy = commands.add_parser("copy", help="beside llama.cpp's types, on a rescaled copy")
    endings = commands.add_parser("json", help="how often JSON ends by itself")
    for each in (check, compare, copy, endings):
        each.add_argument(
            "--folder", type=Path, default=Path("build/real"), help="for what is made"
        )
        each.add_argument("--threads", type=int, default=2)
    for each in (compare, copy):
        each.add_argument("--text", type=Path, required=True, help="that chose nothing of a model")
        each.add_argument("--windows", type=int, default=12, help="of 512 tokens, at most")
    compare.add_argument("--rounds", type=int, default=5)
    for each in (compare, endings):
        each.add_argument("--artifact", type=Path, help="already exported of the file")
    page = commands.add_parser("page", help="write docs/results/real-models.md and its picture")
    page.add_argument("--check", action="store_true", help="write nothing, only compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
