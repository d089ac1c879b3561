"""``edge-memllm bench``: speed, memory and reads of an artifact, against the machine's limits."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edge_memllm.benchmark.plan import CACHES, Plan, Request, Variant, check_maps, readers_for
from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_loading,
    loading_keywords,
    positive_int,
)
from edge_memllm.cli.output import read_text, write_json
from edge_memllm.errors import EdgeMemLLMError, RequestError

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands


SIDES = ("A", "B")
_DEFAULTS = (None, False, 0, "auto")  # of the options of loading
# A colon that settings follow, not that of a drive.
_COLON = re.compile(r":(?=[a-z][a-z-]*(?:[=,]|$))")

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

_STDERR = 2
_PROCESSOR = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


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
        make_synthetic(arguments.synthetic, arguments.beta, arguments.out)
        arguments.artifact = arguments.out
    from edge_memllm.benchmark.benchmark import measure
    from edge_memllm.cli.analysis.bench_page import page
    from edge_memllm.cli.output import StageBars

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


def make_synthetic(preset: str, beta: int | None, out: Path) -> None:
    """Write a random checkpoint of ``preset`` and export it, in processes of their own.

    So the memory measured afterwards is the runtime's alone. Needs as much memory as any export:
    the checkpoint in float16 and about a gigabyte.
    """
    if out.exists():
        raise RequestError(f"{out}: exists already. Measure it: edge-memllm bench {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.checkpoint-", dir=out.parent) as folder:
        shape = ["--preset", preset] if beta is None else ["--preset", preset, "--beta", str(beta)]
        small = ["--set", "training.save_dtype=float16"]
        run_step("train", *shape, "--steps", "0", "--out", folder, *small)
        fast = ("--no-verify", "--graph-method", "rtn", "--compute-dtype", _fast_dtype())
        run_step("export", folder, str(out), *fast)


def run_step(*words: str) -> None:
    """Run one of our commands in a process of its own; what it prints goes to stderr."""
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    done = subprocess.run(command, stdout=_STDERR, check=False)
    if done.returncode:
        raise EdgeMemLLMError(
            f"'edge-memllm {words[0]}' ended with exit code {done.returncode}; it said why above."
        )


def _fast_dtype(processor: Path = _PROCESSOR) -> str:
    """The arithmetic for the rows: bfloat16 is several times faster only where it is built in."""
    try:
        words = set(processor.read_text(encoding="utf-8").split())
    except OSError:
        return "float32"
    return "bfloat16" if words & _BFLOAT16 else "float32"
