"""``edge-memllm bench``: speed, memory and reads of an artifact, against the machine's limits."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

from edge_memllm.benchmark.benchmark import measure
from edge_memllm.benchmark.plan import CACHES, Plan, Request, Variant, check_maps, readers_for
from edge_memllm.cli.analysis.bench_page import page
from edge_memllm.cli.models import Yes, local_artifact
from edge_memllm.cli.options import Command, Json, add_options, options_of
from edge_memllm.cli.output import StageBars, write_json
from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.loading import LoadOptions
from edge_memllm.options import Group, Option, keywords, positive_ints

SIDES = ("A", "B")
_SYNTHETIC = "an artifact with random weights"
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


def words(text: str) -> tuple[str, ...]:
    """Parse words with commas between them."""
    return tuple(word for word in text.split(",") if word)


def cache_states(text: str) -> tuple[str, ...]:
    """Parse states of the cache with commas between them."""
    for name in words(text):
        if name not in CACHES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CACHES)}")
    return words(text)


@dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """In what variants may differ: lists, of which every combination is one, and loading."""

    cache: Annotated[
        tuple[str, ...],
        Option(
            f"where records come from: {', '.join(CACHES)}",
            metavar="STATE[,...]",
            parse=cache_states,
            several="list",
        ),
    ] = ("warm",)
    speculate: Annotated[int, Option("draft tokens of one step, as in 'run'")] = 0
    reader: Annotated[
        tuple[str, ...],
        Option(
            "read with these where the state allows it",
            metavar="NAME[,...]",
            parse=words,
            several="list",
            unset="pread, direct or ram",
            group="loading",
        ),
    ] = ()
    threads: Annotated[
        tuple[int | None, ...],
        Option(
            "threads of the graph on a CPU",
            metavar="N[,...]",
            parse=positive_ints,
            several="list",
            unset="one per physical core",
            group="loading",
        ),
    ] = (None,)
    loading: Annotated[
        LoadOptions,
        Group("loading", without={"path": "", "reader": "auto", "threads": None}),
    ]

    def variants(self, side: str, artifact: Path) -> list[Variant]:
        """Return every combination of cache, reader and threads."""
        threads = list(dict.fromkeys(self.threads))
        readers = list(dict.fromkeys(self.reader))
        settings = _settings(self.loading)
        return [
            Variant(
                name=_name(side, cache, reader if readers else "", count if threads[1:] else None),
                artifact=artifact,
                cache=cache,
                reader=reader,
                settings=settings | ({} if count is None else {"threads": count}),
                speculate=self.speculate,
            )
            for count in threads
            for cache, reader in readers_for(list(dict.fromkeys(self.cache)), readers)
        ]


@dataclass(frozen=True)
class BenchOptions:
    """What may be asked of ``edge-memllm bench``."""

    artifact: Annotated[
        Path | None, Option("an exported model, or what 'run' makes one of", metavar="MODEL")
    ] = None
    _: KW_ONLY
    compare: Annotated[
        tuple[str, ...],
        Option("measure the ratio of two variants", metavar=("A", "B"), parse=str, several=2),
    ] = ()
    plan: Annotated[Plan, Group()]
    json: Json = False
    yes: Yes = False
    variants: Annotated[VariantOptions, Group()]
    synthetic: Annotated[
        str | None,
        Option("micro, tiny, small, 250m, 750m or 1b", metavar="PRESET", group=_SYNTHETIC),
    ] = None
    beta: Annotated[
        int | None, Option("0 MemoryLLM, 1-3 Flex, 8 dense", unset="0", group=_SYNTHETIC)
    ] = None
    out: Annotated[
        Path | None, Option("where to write it", metavar="ARTIFACT", group=_SYNTHETIC)
    ] = None

    def check(self) -> None:
        """Raise `RequestError` unless it is clear what to measure."""
        if self.plan.seed < 0:
            raise RequestError(f"--seed is {self.plan.seed}, expected 0 or more.")
        if self.synthetic is not None:
            if self.artifact is not None or self.out is None:
                raise RequestError("--synthetic needs --out ARTIFACT, and no other ARTIFACT.")
        elif self.out is not None or self.beta is not None:
            raise RequestError("--out and --beta are for --synthetic PRESET.")
        elif self.artifact is None and not self.compare:
            raise RequestError("Give a MODEL, or --synthetic PRESET with --out ARTIFACT.")


def request(options: BenchOptions) -> Request:
    """What to measure. Raises `RequestError` for what cannot be combined."""
    plan = replace(options.plan, contexts=tuple(dict.fromkeys(options.plan.contexts)))
    if not options.compare:
        assert options.artifact is not None
        variants = options.variants.variants("", options.artifact)
        check_maps(variants)
        return Request(plan, variants)
    first, second = (
        _side(name, text, options) for name, text in zip(SIDES, options.compare, strict=True)
    )
    if len(first) != len(second):
        raise RequestError(
            f"--compare: A stands for {len(first)} variants and B for {len(second)}. Name a "
            "setting with several values outside of A and B, or a single one in each."
        )
    check_maps([*first, *second])
    pairs = [(place, place + len(first)) for place in range(len(first))]
    return Request(plan, [*first, *second], pairs)


def _settings(loading: LoadOptions) -> dict[str, Any]:
    """The keywords of `load` that have another value than their default, for JSON."""
    defaults = keywords(LoadOptions(""))
    given = {name: value for name, value in keywords(loading).items() if value != defaults[name]}
    if given.get("packed_cache") is not None:
        given["packed_cache"] = str(given["packed_cache"])
    if "overlays" in given:
        given["overlays"] = tuple(map(str, given["overlays"]))
    return given


def _side(name: str, text: str, options: BenchOptions) -> list[Variant]:
    """The variants of A or B: ``PATH``, ``PATH:SETTINGS`` or ``SETTINGS``."""
    path, settings = _split(text)
    artifact = Path(path) if path else options.artifact
    if artifact is None:
        raise RequestError(f"--compare {text}: names no artifact, and there is no ARTIFACT.")
    given = _SettingsParser(text).parse_args([f"--{word}" for word in words(settings)])
    return options_of(VariantOptions, given, options.variants).variants(name, artifact)


def _name(side: str, cache: str, reader: str, threads: int | None) -> str:
    words = [side, cache, reader, "" if threads is None else f"x{threads}"]
    return " ".join(word for word in words if word)


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
        add_options(self, VariantOptions)

    def error(self, message: str) -> NoReturn:
        """Say which side is wrong."""
        raise RequestError(f"--compare {self._side}: {message}.")


def execute(options: BenchOptions) -> int:
    """Run the command; 1 when outputs that must be the same are not."""
    options.check()
    if options.synthetic is not None and options.out is not None:
        make_synthetic(options.synthetic, options.beta, options.out)
        options = replace(options, artifact=options.out)
    asked = request(options)
    with StageBars() as bars:
        report = measure(_exported(asked, bars, yes=options.yes), bars)
    if options.compare:
        report["compared"] = dict(zip(SIDES, options.compare, strict=True))
    if options.json:
        write_json(report)
    else:
        print(page(report))
    if not report["identical"]:
        print("error: outputs that must be the same differ; see 'identity'.", file=sys.stderr)
        return 1
    return 0


def _exported(asked: Request, bars: StageBars, *, yes: bool) -> Request:
    """The same of artifacts alone, each exported first if need be and allowed."""
    folders = {
        source: local_artifact(source, bars, yes=yes)
        for source in dict.fromkeys(each.artifact for each in asked.variants)
    }
    variants = [replace(each, artifact=folders[each.artifact]) for each in asked.variants]
    return replace(asked, variants=variants)


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
        fast = (
            "--no-verify",
            "--graph-weights",
            "int4",
            "--graph-method",
            "rtn",
            "--compute-dtype",
            _fast_dtype(),
        )
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


BENCH = Command(BenchOptions, execute, _DESCRIPTION, _EXAMPLES)
