"""Speed, load and memory of our artifact and of llama.cpp on the same file, in turns.

Every contender has a process of its own that rests while another has its turn, and starts anew in
each round, so that loading is measured as often as the rest. Linux only, as the processes of
`benchmarks.peers` are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.contenders import Contender
from benchmarks.peers.worker import Worker, wait_for_quiet

POSITIONS = (128, 512, 1024)
PREFILL = 512
OURS = "edge-memllm"
CONTENDERS = (
    Contender(OURS, OURS, "edge", None, rehearse=True),
    Contender("llama.cpp", "llama.cpp", "llama", "gguf", {"mmap": True}),
    Contender("llama.cpp, no mmap", "llama.cpp, no mmap", "llama", "gguf", {"mmap": False}),
)
_FIRST_WORD, _VOCABULARY = 32, 49_152  # ids below the first may have a meaning
_DISTURBANCE = 0.03  # share of the processors that others may take during a run
_PATIENCE = 10.0  # seconds to wait for a quiet machine
_ATTEMPTS = 3

# Figure: (unit, whether more is better), in the order of the page.
FIGURES = {
    **{f"decode_{position}": ("tokens/s", True) for position in POSITIONS},
    "prefill": ("tokens/s", True),
    "load": ("s", False),
    "own_memory": ("MB", False),
    "mapped_memory": ("MB", False),
}


@dataclass(frozen=True)
class Measuring:
    """How much is measured."""

    rounds: int
    threads: int
    steps: int  # decoded tokens timed


def measure(artifact: Path, gguf: Path, asked: Measuring) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield rounds: contender -> figure -> value, and how much others took of the processors."""
    for number in range(asked.rounds):
        with ExitStack() as running:
            workers = [
                running.enter_context(
                    Worker(
                        each,
                        artifact if each.model is None else gguf,
                        asked.threads,
                        max(POSITIONS) + asked.steps + 1,
                    )
                )
                for each in CONTENDERS
            ]
            yield _round(workers, number, asked.steps)


def _round(workers: Sequence[Worker], number: int, steps: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        worker.contender.name: {
            "load": worker.loaded["load_seconds"],
            "settings": worker.loaded["settings"],
        }
        for worker in workers
    }
    for length in POSITIONS:
        prompt = _prompt(number, length)
        for worker in workers:
            run, figures = _undisturbed(worker, prompt, steps), found[worker.contender.name]
            figures[f"decode_{length}"] = steps / sum(run["step_seconds"])
            if length == PREFILL:
                figures["prefill"] = length / run["prefill_seconds"]
            # The last position is the longest text, with the most memory.
            figures["own_memory"] = run["anon_bytes"] / 1e6
            figures["mapped_memory"] = run["file_bytes"] / 1e6
            taken = run["taken_by_others"]
            figures["taken_by_others"] = max(taken, figures.get("taken_by_others", 0.0))
    return found


def _undisturbed(worker: Worker, prompt: list[int], steps: int) -> dict[str, Any]:
    """Return the first run that others left in peace, or the quietest of a few."""
    if worker.contender.rehearse:
        worker.run(prompt, steps)
    runs = []
    while len(runs) < _ATTEMPTS:
        wait_for_quiet(_DISTURBANCE, _PATIENCE)
        runs.append(worker.run(prompt, steps))
        if runs[-1]["taken_by_others"] <= _DISTURBANCE:
            break
    return min(runs, key=lambda run: float(run["taken_by_others"]))


def _prompt(number: int, length: int) -> list[int]:
    words = range(_FIRST_WORD, _VOCABULARY)
    return random.Random(f"{number}/{length}").sample(words, length)


def summary(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return contender -> figure -> median, least, most, and the ratios of ours to it."""
    return {
        name: {
            "settings": rounds[0][name]["settings"],
            "disturbed": sum(each[name]["taken_by_others"] > _DISTURBANCE for each in rounds),
            **{figure: _figure(rounds, name, figure) for figure in FIGURES},
        }
        for name in rounds[0]
    }


def _figure(
    rounds: Sequence[Mapping[str, Mapping[str, Any]]], name: str, figure: str
) -> dict[str, float]:
    values = [each[name][figure] for each in rounds]
    ratios = [each[OURS][figure] / value for each, value in zip(rounds, values, strict=True)]
    return {**_spread(values), **{f"ours_{key}": value for key, value in _spread(ratios).items()}}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}
