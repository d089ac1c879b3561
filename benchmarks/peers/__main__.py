"""Our runtime and its peers on one machine, in turns, with the same number of threads.

    python -m benchmarks.peers --models DIR --artifact ARTIFACT [--rounds 5] [--json FILE]
    python -m benchmarks.peers --models DIR --check

Each contender runs in a process of its own and waits, without computing, while another has its
turn: A B C D, A B C D, ... for each workload of each round. A run reads a prompt of distinct random
tokens (the same for all, another one each round) and decodes greedily. It waits a while for the
rest of the machine to be idle, and is repeated, whatever its result, where others took more of the
processors than --disturbance; what stays disturbed is left out of the medians. Models of the peers
that are missing in DIR are made first.

Prints Markdown tables: medians (lowest to highest), how many times as fast edge-memllm is (median
of the rounds), settings, environment. `run.sh` makes the environment first.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import CONTENDERS, OURS, Contender, chosen
from benchmarks.peers.models import ensure
from benchmarks.peers.page import PREFILL_512, WORKLOADS, as_json, markdown, ratios, summary, table
from benchmarks.peers.worker import Worker, wait_for_quiet

_VOCABULARY = 128_256
_WARM_UP = 16
_ATTEMPTS = 3
_PACKAGES = (
    *("edge-memllm", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "gguf", "numpy"),
)


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.check:
        return _check(arguments.models)
    contenders = chosen(arguments.contender)
    if any(each.model is None for each in contenders) and arguments.artifact is None:
        _parser().error("--artifact is missing: the MemoryLLM artifact to compare")
    arguments.models.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        workers = [running.enter_context(_start(each, arguments)) for each in contenders]
        rounds = [_round(workers, number, arguments) for number in range(arguments.rounds)]
    report = _report(workers, rounds, arguments)
    if arguments.json:
        arguments.json.write_text(as_json(report), encoding="utf-8")
    print(_page(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=Path, required=True, metavar="DIR", help="where the peers' models are kept"
    )
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="the MemoryLLM artifact")
    parser.add_argument(
        "--contender",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"only these; of {', '.join(CONTENDERS)} (default: all but the slower variants)",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "--steps", type=int, default=32, metavar="N", help="decoded tokens timed (default: 32)"
    )
    parser.add_argument(
        "--disturbance",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="of the processors that others may take during a run (default: 0.03)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=10,
        metavar="SECONDS",
        help="to wait for a quiet machine before a run (default: 10)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare logits and tokens of a tiny network in all runtimes instead",
    )
    return parser


def _start(contender: Contender, arguments: argparse.Namespace) -> Worker:
    """Load a contender and let it run once, so that no measured run is the first."""
    if contender.model is None:
        model = arguments.artifact
    else:
        model = ensure(arguments.models, contender.model, "1b")
    context = max(WORKLOADS.values()) + arguments.steps + 1
    print(f"loading {contender.name}", file=sys.stderr)
    worker = Worker(contender, model, arguments.threads, context)
    worker.run(_prompt(-1, _WARM_UP), 2)
    return worker


def _prompt(number: int, length: int) -> list[int]:
    """Distinct token ids, without the first few, which may have a meaning."""
    return random.Random(f"{number}/{length}").sample(range(16, _VOCABULARY), length)


def _round(
    workers: list[Worker], number: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Every workload of every contender once: contender -> workload -> run."""
    found: dict[str, dict[str, Any]] = {worker.contender.name: {} for worker in workers}
    for workload, length in WORKLOADS.items():
        prompt = _prompt(number, length)
        decoded = 0 if workload == PREFILL_512 else arguments.steps
        for worker in workers:
            run = _undisturbed(worker, prompt, decoded, arguments)
            found[worker.contender.name][workload] = run
        print(f"round {number + 1}: {workload}", file=sys.stderr)
    return found


def _undisturbed(
    worker: Worker, prompt: list[int], steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The first run that others left in peace, or the quietest of a few."""
    if worker.contender.rehearse:
        worker.run(prompt, steps)
    runs: list[dict[str, Any]] = []
    while len(runs) < _ATTEMPTS:
        wait_for_quiet(arguments.disturbance, arguments.patience)
        runs.append(worker.run(prompt, steps))
        if runs[-1]["taken_by_others"] <= arguments.disturbance:
            break
    return min(runs, key=lambda run: float(run["taken_by_others"]))


def _report(
    workers: list[Worker], rounds: list[dict[str, dict[str, Any]]], arguments: argparse.Namespace
) -> dict[str, Any]:
    runs = {w.contender.name: [each[w.contender.name] for each in rounds] for w in workers}
    return {
        "environment": _environment(arguments.threads),
        "rounds": len(rounds),
        "steps": arguments.steps,
        "contenders": {
            name: summary(worker.loaded, runs[name], runs.get(OURS), arguments.disturbance)
            for name, worker in zip(runs, workers, strict=True)
        },
        "runs": runs,
    }


def _page(report: dict[str, Any]) -> str:
    labels = {name: each.label for name, each in CONTENDERS.items()}
    summaries = report["contenders"]
    environment = markdown(["", ""], [[k, str(v)] for k, v in report["environment"].items()])
    settings = markdown(
        ["", "settings"],
        [
            [labels[name], ", ".join(f"{k} {v}" for k, v in each["settings"].items())]
            for name, each in summaries.items()
        ],
    )
    parts = [table(summaries, labels), ratios(summaries, labels), settings, environment]
    return "\n\n".join(part for part in parts if part)


def _environment(threads: int) -> dict[str, Any]:
    """Where this was measured, without names or paths."""
    return {
        "processor": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads,
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def _first(file: str, key: str) -> str:
    for line in Path(file).read_text("utf-8").splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return "unknown"


def _check(models: Path) -> int:
    """A tiny network of its own folder, through every runtime."""
    from benchmarks.peers import check

    folder = models / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    results = check.check(folder)
    print(check.page(results))
    return 0 if all(each["ok"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
