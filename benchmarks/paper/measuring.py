"""All measurements of all finished runs of a folder; what is current is not measured again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.paper.judging import Judge
from benchmarks.paper.measurements import MEASUREMENTS, Measurement
from benchmarks.paper.runs import Run, read_runs
from benchmarks.paper.store import FOLDER, Results


def measure_runs(
    folder: Path, judge: Judge, only: Sequence[str] = (), results: Path = FOLDER
) -> Iterator[str]:
    """Measure and store; yield a line for each entry that was made. `only` names measurements."""
    for measurement in MEASUREMENTS:
        if only and measurement.name not in only:
            continue
        for run in read_runs(folder):
            if measurement.measures(run):
                yield from _measure(measurement, run, judge, Results(measurement.name, results))


def _measure(measurement: Measurement, run: Run, judge: Judge, results: Results) -> Iterator[str]:
    key = {"digest": run.digest(), "settings": measurement.settings(judge)}
    if results.is_current(run.name, key):
        return
    start = perf_counter()
    figures = measurement.figures(run, judge)
    seconds = round(perf_counter() - start, 1)
    about = {"variant": run.variant, "seed": run.seed, "model": run.facts()}
    results.put(run.name, {**about, **key, "seconds": seconds, "figures": figures})
    yield f"{measurement.name}: {run.name}, {seconds:.0f} s"
