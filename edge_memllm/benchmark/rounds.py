"""Rounds of measurements: in each, every variant has its turn, and the limits are taken anew.

What drifts (other programs, a shared machine, temperature) then meets all variants alike. The
order changes from round to round.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Self

import numpy as np

from edge_memllm import errors
from edge_memllm.benchmark.machine import BandwidthSample, DeviceProbe, MemoryBandwidth
from edge_memllm.benchmark.plan import FROM_STORAGE, Plan, Variant
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.progress import Progress

_COMMAND = [sys.executable, "-m", "edge_memllm.benchmark.worker"]
_KILLED = -9
_PATIENCE = 10.0  # seconds for a worker to end by itself

_SINGLES = 33  # the first of the device's is not counted
_BATCH = 256  # a chunk of a prompt on a CPU


class Worker:
    """One process with one variant loaded. Use it as a context manager: leaving ends it."""

    def __init__(self, variant: Variant, plan: Plan) -> None:
        """Start the process and wait until the variant is loaded. Raises what loading raises."""
        self.variant = variant
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        try:
            self.description: dict[str, Any] = self._exchange(
                {"variant": variant.as_dict(), "plan": asdict(plan)}
            )
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(at_once=kind is not None)

    @property
    def threads(self) -> int:
        """Threads that compute the graph."""
        from edge_memllm_runtimes.options import physical_cores

        return int(self.variant.settings.get("threads") or physical_cores())

    def ask(self, command: str, **values: Any) -> Any:
        """Have the process do something, and return what comes of it. Raises what it raises."""
        return self._exchange({"command": command, **values})

    def _exchange(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died()
        reply = json.loads(line)
        if "error" in reply:
            raise getattr(errors, reply["error"])(reply["message"])
        return reply["done"]

    def _died(self) -> EdgeMemLLMError:
        code = self._process.wait()
        if code == _KILLED:
            reason = "Memory may have run out: all variants are loaded together, measure fewer."
        else:
            reason = "It said why above."
        return EdgeMemLLMError(
            f"The process that measures '{self.variant.name}' ended with code {code}. {reason}"
        )

    def _end(self, *, at_once: bool = True) -> None:
        if at_once:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_workers(variants: Sequence[Variant], plan: Plan, opened: ExitStack) -> list[Worker]:
    """Start one worker per variant, one after the other, so that none disturbs loading."""
    return [opened.enter_context(Worker(variant, plan)) for variant in variants]


@dataclass(frozen=True, slots=True)
class Sample:
    """One trial of one worker, and what memory gave right before it."""

    worker: int
    context: int
    round: int
    bandwidth: BandwidthSample | None  # None when the graph does not run on the CPU
    trial: dict[str, Any]


def trial_rounds(
    crew: Sequence[Worker], plan: Plan, memory: MemoryBandwidth, progress: Progress
) -> list[Sample]:
    """Return the samples of all rounds."""
    turns = list(_turns(len(crew), plan))
    samples = []
    for done, (number, context, index) in enumerate(turns):
        progress("trials", done, len(turns))
        worker = crew[index]
        on_cpu = worker.description["device"] == "cpu"
        bandwidth = memory.sample(worker.threads) if on_cpu else None
        trial = worker.ask("measure", context=context, number=number)
        samples.append(Sample(index, context, number, bandwidth, trial))
    progress("trials", len(turns), len(turns))
    return samples


def _turns(workers: int, plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Round, context and worker of each turn; a round starts one worker further than the last."""
    for number in range(plan.repeats):
        for context in plan.contexts:
            for place in range(workers):
                yield number, context, (number + place) % workers


@dataclass(slots=True)
class Reads:
    """Seconds and rates of reading records alone, one figure per round."""

    single_seconds: list[float] = field(default_factory=list)  # median over single records
    rates: list[float] = field(default_factory=list)  # bytes per second, many records at once


@dataclass(frozen=True, slots=True)
class StorageReads:
    """What the device gave, by way of reading, and what each worker's reader made of it."""

    device: Reads
    device_ways: dict[str, list[float]]
    workers: dict[int, Reads]


def read_rounds(
    crew: Mapping[int, Worker], probe: DeviceProbe, plan: Plan, vocabulary: int, progress: Progress
) -> StorageReads:
    """Read random records: the device alone, then each of these workers from storage.

    Every turn draws records of its own, as a device or a hypervisor may keep what it has read.
    """
    readers = [index for index, each in crew.items() if each.variant.cache in FROM_STORAGE]
    device, ways = Reads(), {way: list[float]() for way in probe.ways}
    workers = {index: Reads() for index in readers}
    random = np.random.default_rng([plan.seed, vocabulary])
    for number in range(plan.repeats):
        progress("reads", number, plan.repeats)
        singles = probe.single_seconds(_draw(random, vocabulary, _SINGLES))
        device.single_seconds.append(median(singles))
        for way, rates in ways.items():
            rates.append(probe.batch_rate(way, _draw(random, vocabulary, _BATCH)))
        for place in range(len(readers)):
            index = readers[(number + place) % len(readers)]
            _note(workers[index], crew[index], random, vocabulary)
    progress("reads", plan.repeats, plan.repeats)
    device.rates = max(ways.values(), key=lambda rates: float(np.median(rates)))
    return StorageReads(device, ways, workers)


def _note(reads: Reads, worker: Worker, random: np.random.Generator, vocabulary: int) -> None:
    found = worker.ask(
        "read",
        singles=_draw(random, vocabulary, _SINGLES),
        batch=_draw(random, vocabulary, _BATCH),
    )
    reads.single_seconds.append(median(found["single_seconds"]))
    reads.rates.append(found["batch_bytes"] / found["batch_seconds"])


def _draw(random: np.random.Generator, vocabulary: int, count: int) -> list[int]:
    ids: list[int] = random.choice(vocabulary, min(count, vocabulary), replace=False).tolist()
    return ids
