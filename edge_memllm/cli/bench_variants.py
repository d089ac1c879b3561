"""From the options of ``bench`` to what is measured: every combination is one variant."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from edge_memllm.benchmark.plan import CACHES, Plan, Request, Variant, check_maps, readers_for
from edge_memllm.cli.files import read_text
from edge_memllm.cli.options import add_loading, loading_keywords, positive_int
from edge_memllm.errors import RequestError

SIDES = ("A", "B")
_DEFAULTS = (None, False, 0, "auto")  # of the options of loading
# A colon that settings follow, not that of a drive.
_COLON = re.compile(r":(?=[a-z][a-z-]*(?:[=,]|$))")


def add_variant_options(parser: argparse.ArgumentParser) -> None:
    """Options that may take several values, and those of loading."""
    parser.add_argument(
        "--cache",
        type=_caches,
        action="extend",
        metavar="STATE[,...]",
        help=f"where records come from: {', '.join(CACHES)} (default: warm)",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="draft tokens of one step, as in 'run' (default: 0)",
    )
    parser.conflict_handler = "resolve"  # several values here, where other commands take one
    group = add_loading(parser)
    group.add_argument(
        "--reader",
        type=_names,
        action="extend",
        metavar="NAME[,...]",
        help="read with these where the state allows it (default: pread, direct or ram)",
    )
    group.add_argument(
        "--threads",
        type=positive_ints,
        action="extend",
        metavar="N[,...]",
        help="threads of the graph on a CPU (default: one per physical core)",
    )


def request(arguments: argparse.Namespace) -> Request:
    """What to measure. Raises `RequestError` for what cannot be combined."""
    plan = Plan(
        contexts=tuple(dict.fromkeys(arguments.context or [128])),
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        seed=arguments.seed,
        text=read_text(arguments.prompt_file) if arguments.prompt_file else None,
    )
    if arguments.compare is None:
        variants = _variants("", arguments.artifact, vars(arguments))
        check_maps(variants)
        return Request(plan, variants)
    first, second = (
        _variants(name, *_side(text, arguments))
        for name, text in zip(SIDES, arguments.compare, strict=True)
    )
    if len(first) != len(second):
        raise RequestError(
            f"--compare: A stands for {len(first)} variants and B for {len(second)}. Name a "
            "setting with several values outside of A and B, or a single one in each."
        )
    check_maps([*first, *second])
    pairs = [(place, place + len(first)) for place in range(len(first))]
    return Request(plan, [*first, *second], pairs)


def _variants(side: str, artifact: Path, options: dict[str, Any]) -> list[Variant]:
    """Every combination of cache, reader and threads."""
    caches = list(dict.fromkeys(options["cache"] or ["warm"]))
    readers = list(dict.fromkeys(options["reader"] or []))
    threads = list(dict.fromkeys(options["threads"] or [None]))
    settings = _settings(options)
    return [
        Variant(
            name=_name(side, cache, reader if readers else "", count if threads[1:] else None),
            artifact=artifact,
            cache=cache,
            reader=reader,
            settings=settings | ({} if count is None else {"threads": count}),
            speculate=options["speculate"],
        )
        for count in threads
        for cache, reader in readers_for(caches, readers)
    ]


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `load` that were asked for; the rest keeps its default."""
    given = loading_keywords(argparse.Namespace(**options))
    given = {name: each for name, each in given.items() if name not in ("reader", "threads")}
    if given["packed_cache"] is not None:
        given["packed_cache"] = str(given["packed_cache"])
    given["overlays"] = tuple(map(str, given["overlays"])) or None
    return {name: value for name, value in given.items() if value not in _DEFAULTS}


def _name(side: str, cache: str, reader: str, threads: int | None) -> str:
    words = [side, cache, reader, "" if threads is None else f"x{threads}"]
    return " ".join(word for word in words if word)


def _side(text: str, arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Artifact and options of A or B: ``PATH``, ``PATH:SETTINGS`` or ``SETTINGS``."""
    path, settings = _split(text)
    artifact = Path(path) if path else arguments.artifact
    if artifact is None:
        raise RequestError(f"--compare {text}: names no artifact, and there is no ARTIFACT.")
    words = [f"--{word}" for word in settings.split(",") if word]
    parser = _SettingsParser(text)
    found = vars(parser.parse_args(words))
    named = {word[2:].partition("=")[0].replace("-", "_") for word in words}
    return artifact, vars(arguments) | {name: found[name] for name in named}


def _split(text: str) -> tuple[str, str]:
    if Path(text).exists():
        return text, ""
    before, *behind = _COLON.split(text, maxsplit=1)
    if behind:
        return before, behind[0]
    return ("", text) if "=" in text else (text, "")


class _SettingsParser(argparse.ArgumentParser):
    """Reads the settings of one side as the options they are named after."""

    def __init__(self, side: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._side = side
        add_variant_options(self)

    def error(self, message: str) -> NoReturn:
        """Say which side is wrong."""
        raise RequestError(f"--compare {self._side}: {message}.")


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _caches(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in CACHES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CACHES)}")
    return names


def positive_ints(text: str) -> list[int]:
    """An argparse type: whole numbers of at least one, with commas between them."""
    return [positive_int(word) for word in _names(text)]
