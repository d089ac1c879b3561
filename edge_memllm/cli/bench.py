"""``edge-memllm bench``: speed, memory and reads of an artifact, against what memory allows."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.options import add_command, add_json, add_loading, positive_int
from edge_memllm.cli.text import byte_count, table, write_json
from edge_memllm.errors import EdgeMemLLMError, RequestError

if TYPE_CHECKING:
    from edge_memllm.cli.measurement import Plan, Trial
    from edge_memllm.cli.options import Commands
    from edge_memllm.model import Model

_STDERR = 2
CACHES = ("cold", "warm", "resident")

_DESCRIPTION = """\
Measure an artifact: prompts of distinct random tokens, greedy decoding of a fixed length, the
median of several trials. --cache says where the table's records come from:
  cold      from storage: its pages leave the page cache before every step
  warm      from the page cache: each trial is run once before it is measured
  resident  from memory: the whole table is loaded first
The roofline is the speed at which memory could deliver the graph's weights and the keys and
values, with the bandwidth measured in the same run (on a CPU).

--synthetic makes an artifact with random weights of a preset first. Its text is noise, its speed
is that of a trained model of this shape."""

_EXAMPLES = """\
  edge-memllm bench artifact --cache cold
  edge-memllm bench artifact --prompt-tokens 256 --new-tokens 64 --repeats 5 --json
  edge-memllm bench --synthetic 250m --out random-250m"""


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
    parser.add_argument("--synthetic", metavar="PRESET", help="tiny, small, 250m, 750m or 1b")
    parser.add_argument(
        "--out", type=Path, metavar="ARTIFACT", help="where --synthetic writes its artifact"
    )
    parser.add_argument(
        "--cache", choices=CACHES, default="warm", help="state of the table (default: warm)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive_int, default=128, metavar="N", help="default: 128"
    )
    parser.add_argument(
        "--new-tokens", type=_at_least_two, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts")
    add_json(parser)
    add_loading(parser, reader=False)


def _at_least_two(text: str) -> int:
    """The first token belongs to the prefill; decoding needs another one to be measured."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more")
    return value


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    artifact = _artifact(arguments)
    import edge_memllm

    reader = "ram" if arguments.cache == "resident" else "pread"
    with edge_memllm.load(
        artifact, device=arguments.device, reader=reader, threads=arguments.threads
    ) as model:
        report = _measure(model, artifact, arguments)
    if arguments.json:
        write_json(report)
    else:
        print(_page(report))
    return 0


def _artifact(arguments: argparse.Namespace) -> Path:
    """The artifact to measure, made first with ``--synthetic``."""
    given: Path | None = arguments.artifact
    if arguments.synthetic is None:
        if given is None or arguments.out is not None:
            raise RequestError("Give an ARTIFACT, or --synthetic PRESET with --out ARTIFACT.")
        return given
    if given is not None or arguments.out is None:
        raise RequestError("--synthetic needs --out ARTIFACT, and no other ARTIFACT.")
    _make_synthetic(arguments.synthetic, arguments.out)
    return Path(arguments.out)


def _make_synthetic(preset: str, out: Path) -> None:
    """Write a random checkpoint of ``preset`` and export it, in processes of their own.

    So the memory measured afterwards is the runtime's alone.
    """
    if out.exists():
        raise RequestError(f"{out}: exists already. Measure it: edge-memllm bench {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.checkpoint-", dir=out.parent) as folder:
        small = ["--set", "training.save_dtype=float16"]
        _step("train", "--preset", preset, "--steps", "0", "--out", folder, *small)
        _step("export", folder, str(out), "--no-verify")


def _step(*words: str) -> None:
    """Run one of our commands in a process of its own; what it prints goes to stderr."""
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    done = subprocess.run(command, stdout=_STDERR, check=False)
    if done.returncode:
        raise EdgeMemLLMError(
            f"'edge-memllm {words[0]}' ended with exit code {done.returncode}; it said why above."
        )


def _measure(model: Model, artifact: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the trials and put the figures together."""
    from edge_memllm.cli import measurement
    from edge_memllm.statistics import process_memory
    from edge_memllm_runtimes.processors import physical_cores

    plan = measurement.Plan(
        arguments.prompt_tokens, arguments.new_tokens, arguments.repeats, arguments.seed
    )
    trials = _trials(model, plan, artifact, arguments.cache)
    memory = process_memory()  # before the roofline's own array
    figures = measurement.medians(trials)
    threads = arguments.threads or physical_cores()
    return {
        **figures,
        "peak_rss_bytes": memory.peak_bytes,
        "rss_anon_bytes": memory.anon_bytes,
        "rss_file_bytes": memory.file_bytes,
        "cache": arguments.cache,
        "device": model.device,
        "reader": model.reader,
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "repeats": plan.repeats,
        "seed": plan.seed,
        "roofline": _roofline(model, plan, figures["decode_tokens_per_second"], threads),
        "environment": measurement.environment(model.runtime.name, threads),
    }


def _roofline(model: Model, plan: Plan, speed: float, threads: int) -> dict[str, float] | None:
    """None off the CPU: its memory says nothing about that of a GPU."""
    from edge_memllm.cli import measurement
    from edge_memllm.cli.footprint import graph_file_bytes

    if model.device != "cpu":
        return None
    graph_bytes = graph_file_bytes(model.manifest)
    return measurement.roofline(model.manifest, graph_bytes, plan, speed, threads)


def _trials(model: Model, plan: Plan, artifact: Path, cache: str) -> list[Trial]:
    from edge_memllm.cli import measurement

    prompts = measurement.prompts(plan, model.manifest)
    if cache == "cold":
        with measurement.evictor(artifact / model.manifest.table.file) as evict:
            return [measurement.run_trial(model, each, plan.new_tokens, evict) for each in prompts]
    trials = []
    for prompt in prompts:
        measurement.run_trial(model, prompt, plan.new_tokens, _nothing)  # touches the records
        trials.append(measurement.run_trial(model, prompt, plan.new_tokens, _nothing))
    return trials


def _nothing() -> None:
    """What a warm or resident trial does before each step."""


def _page(report: dict[str, Any]) -> str:
    where = report["environment"]
    read = byte_count(report["table_bytes_read_per_token"])
    trials = f"{report['repeats']} x ({report['prompt_tokens']} + {report['new_tokens']} tokens)"
    place = f"{report['device']}, {where['threads']} threads, {where['processor']}"
    rows = [
        ("decode", f"{report['decode_tokens_per_second']:.1f} tokens/s"),
        ("prefill", f"{report['prefill_tokens_per_second']:.1f} tokens/s"),
        ("first token", f"after {report['time_to_first_token_seconds']:.3f} s"),
        ("table", f"{read} and {report['reads_per_token']:.2f} reads per token, {report['cache']}"),
        ("memory", _memory(report)),
        ("roofline", _limit(report["roofline"])),
        ("measured", f"{trials}, median; {place}"),
    ]
    return table(rows)


def _limit(line: dict[str, float] | None) -> str:
    if line is None:
        return "not measured on this device"
    limit = f"{line['limit_tokens_per_second']:.1f} tokens/s"
    bandwidth = f"{byte_count(line['bandwidth_bytes_per_second'])}/s"
    return f"{limit} at {bandwidth}; decode reaches {line['ratio']:.0%}"


def _memory(report: dict[str, Any]) -> str:
    if report["rss_anon_bytes"] is None:
        return "not known on this system"
    return (
        f"{byte_count(report['rss_anon_bytes'])} of its own, "
        f"{byte_count(report['rss_file_bytes'])} of mapped files, "
        f"{byte_count(report['peak_rss_bytes'])} at most"
    )
