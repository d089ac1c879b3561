"""A real model, SmolLM2-135M-Instruct from its GGUF file, through every door.

    python -m benchmarks.real check [--folder DIR] [--threads N] [EXPORT OPTIONS]

``check`` is what ``make real`` runs: it fetches the file, exports it, asks it, asks it by its
name, and compares it with its float weights in transformers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    arguments, more = _parser().parse_known_args(words)
    return _check(arguments, more)


def _check(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    from benchmarks.real.check import check
    from benchmarks.real.model_file import NoModelError, model_file

    start = time.perf_counter()
    try:
        file = model_file(arguments.folder)
    except NoModelError as error:
        print(f"real: {error}", file=sys.stderr)
        return 1
    wrong = 0
    for finding in check(file, arguments.folder, options, arguments.threads):
        wrong += not finding.holds
        print(f"{'ok    ' if finding.holds else 'WRONG '} {finding.words}", flush=True)
    seconds = time.perf_counter() - start
    print(f"real: {'all holds' if not wrong else f'{wrong} wrong'}, {seconds:.0f} s")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="whether the model holds; other options: export's")
    check.add_argument("--folder", type=Path, default=Path("build/real"), help="for what is made")
    check.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
