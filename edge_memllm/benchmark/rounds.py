"""Rounds of measurements: in each, every variant has its turn, and the limits are taken anew.

What drifts (other programs, a shared machine, temperature) then meets all variants alike. The
order changes from round to round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from edge_memllm.benchmark.bandwidth import BandwidthSample, MemoryBandwidth
from edge_memllm.benchmark.crew import Worker
from edge_memllm.benchmark.device import DeviceProbe
from edge_memllm.benchmark.plan import FROM_STORAGE, Plan

_SINGLES = 33  # the first of the device's is not counted
_BATCH = 256  # a chunk of a prompt on a CPU

Progress = Callable[[str, int, int], None]


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
