"""llama.cpp's own checks of its server, against `edge-memllm serve`.

    python -m benchmarks.llama_server run --llama-cpp FOLDER [--only WORDS] [--work DIR]
    python -m benchmarks.llama_server page [--check]

FOLDER is llama.cpp's: `tools/server/tests` and `models/templates` of it are copied and used. The
source package of llama-cpp-python has it as `vendor/llama.cpp`. `run` exports the model that comes
along with the contexts the checks ask for, runs every check that applies, stores what came out in
docs/results/llama-server.json, and writes the page of it; with `--only`, it stores nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    from benchmarks.llama_server.page import write_page

    if arguments.command == "page":
        return write_page(check=arguments.check)
    from benchmarks.llama_server.running import prepare, run_checks, store

    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        prepare(arguments.llama_cpp, work)
        found = run_checks(work, arguments.only)
        for check in found.checks:
            if check.outcome != "passed":
                print(f"{check.outcome} {check.name}: {check.said}")
        print(f"{found.passed} of {len(found.checks)} checks that apply passed")
        if not arguments.only:
            store(found)
            write_page(check=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.llama_server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--llama-cpp", type=Path, required=True, help="its folder")
    run.add_argument("--only", help="pytest's -k: some checks alone, nothing is stored")
    run.add_argument("--work", type=Path, help="a folder for models and copies, kept")
    page = commands.add_parser("page")
    page.add_argument("--check", action="store_true", help="say whether the page is current")
    return parser


if __name__ == "__main__":
    sys.exit(main())
