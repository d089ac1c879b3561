"""Gemma 4 at its real sizes, with random weights: ours beside llama.cpp on the same network.

    python -m benchmarks.gemma make --folder DIR [--shape e2b] [--tokenizer FOLDER]
    python -m benchmarks.gemma export --folder DIR [--form int4] [EXPORT OPTIONS]
    python -m benchmarks.gemma measure --folder DIR [--rounds 3] [--again]
    python -m benchmarks.gemma limit --folder DIR [--again]
    python -m benchmarks.gemma page [--check]

``make`` writes a folder of transformers in bfloat16 and a GGUF file in Q4_0, ``export`` our
artifact of the folder, timed. ``measure`` adds rounds to those that are stored until there are as
many as asked for; it can be ended and taken up again, and ``--again`` begins anew. A llama.cpp
that was compiled here (llama-cpp-python) has rounds of its own. ``limit`` runs
each contender without a limit of memory and in groups of 2 and 1.5 GB (Linux, root). All store
their figures in docs/results/gemma.json, and write its page. E2B takes 18 GB of disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gemma.groups import NoGroupError
from benchmarks.gemma.making import FORMS, Place, export, make_sources
from benchmarks.gemma.measuring import limited, measure, pack
from benchmarks.gemma.page import write_page
from benchmarks.gemma.shapes import SHAPES
from benchmarks.gemma.store import COMPILED, EXPORTS, LIMITED, ROUNDS, SIZES, keep, part
from benchmarks.peers.llama_library import is_compiled


def main(words: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments, more = parser.parse_known_args(words)
    if more and arguments.command != "export":
        parser.error(f"unknown: {' '.join(more)}")
    if arguments.command == "page":
        return write_page(check=arguments.check)
    place = Place(arguments.folder, arguments.shape)
    try:
        _COMMANDS[arguments.command](place, arguments, more)
    except (FileNotFoundError, NoGroupError, RuntimeError) as error:
        print(f"gemma: {error}", file=sys.stderr)
        return 1
    write_page(check=False)
    return 0


def _make(place: Place, arguments: argparse.Namespace, _: Sequence[str]) -> None:
    make_sources(place, arguments.tokenizer)


def _export(place: Place, arguments: argparse.Namespace, options: Sequence[str]) -> None:
    exports = part(place.shape, EXPORTS, {})
    exports[arguments.form] = export(place, arguments.form, options)
    _say(f"{arguments.form}: {exports[arguments.form]}")
    keep(place.shape, EXPORTS, exports, arguments.threads)


def _measure(place: Place, arguments: argparse.Namespace, _: Sequence[str]) -> None:
    place.check()
    pack(place, arguments.threads)
    keep(place.shape, SIZES, place.sizes(), arguments.threads)
    key = COMPILED if is_compiled() else ROUNDS
    rounds = [] if arguments.again else part(place.shape, key, [])
    while len(rounds) < arguments.rounds:
        rounds.append(measure(place, len(rounds), arguments.threads))
        keep(place.shape, key, rounds, arguments.threads)
        _say(f"round {len(rounds)} of {arguments.rounds}")


def _limit(place: Place, arguments: argparse.Namespace, _: Sequence[str]) -> None:
    place.check()
    pack(place, arguments.threads)
    found = [] if arguments.again else part(place.shape, LIMITED, [])
    for each in limited(place, arguments.threads, [(f["contender"], f["limit"]) for f in found]):
        found.append(each)
        keep(place.shape, LIMITED, found, arguments.threads)
        _say(f"{each['contender']} within {each['limit']}")


_COMMANDS = {"make": _make, "export": _export, "measure": _measure, "limit": _limit}


def _say(words: str) -> None:
    print(f"gemma: {words}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemma",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="the folder and the GGUF file")
    exports = commands.add_parser("export", help="our artifact, timed; other options: export's")
    rounds = commands.add_parser("measure", help="rounds of all contenders, in turns")
    limit = commands.add_parser("limit", help="the same within limits of memory")
    for each in (make, exports, rounds, limit):
        each.add_argument("--folder", type=Path, required=True, help="for what is made")
        each.add_argument("--shape", choices=SHAPES, default="e2b", help="default: e2b")
        each.add_argument("--threads", type=int, default=2, help="default: 2")
    make.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer goes along")
    exports.add_argument("--form", choices=FORMS, default="int4", help="default: int4")
    rounds.add_argument("--rounds", type=int, default=3, help="in all (default: 3)")
    for each in (rounds, limit):
        each.add_argument("--again", action="store_true", help="forget what is stored")
    page = commands.add_parser("page", help="write docs/results/gemma.md and its picture")
    page.add_argument("--check", action="store_true", help="write nothing, only compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
