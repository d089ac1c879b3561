"""How near our readers come to the device: random records, against fio replaying the same offsets.

    python benchmarks/read_rate.py ARTIFACT [--rounds N] [--json]

Batches: distinct random records in calls of 64 and of 512, against fio with 64 reads in flight and
no pause between batches. Single records, one after the other, against fio with one in flight. The
table's page cache is dropped before each run. All take part in each round with the same offsets, in
turning order, after a first pass that is not counted: a cache behind the system's (of a disk, of a
hypervisor) cannot be dropped, so it serves all alike. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from edge_memllm.artifact import Artifact
from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.readers import Region, open_reader
from edge_memllm.record_places import record_region
from edge_memllm.records import RecordBuffer, RecordLayout

BATCHES = (64, 512)
BATCH_READERS = ("pread", "direct", "uring", "mmap")
SINGLE_READERS = ("pread", "direct", "mmap")  # "uring" reads single records as "direct" does
MOST_RATIO = 1.3  # goals: of the device's latency,
LEAST_RATIO = 0.8  # and of fio's rate
PERCENTILES = (50, 99)

Measure = Callable[[list[int]], dict[str, float]]


class Storage:
    """The table of an artifact as a file of records, read by us or by fio."""

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        manifest = artifact.manifest
        table = manifest.table
        self.layout: RecordLayout = manifest.layout
        self.region = record_region(
            self.layout, manifest.model.vocab_size, table.records_offset, table.record_bytes
        )
        self._folder = folder
        # fio's list of reads has no way to quote, so the path must be a simple one.
        self._path = folder / "table"
        self._path.symlink_to((artifact.path / table.file).resolve())

    def drop_cache(self) -> None:
        """Drop the file's pages from the page cache."""
        file = os.open(self._path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

    def by_reader(self, name: str, batch: int) -> Measure:
        """Measure one of our readers, called with `batch` records at a time."""
        buffer = RecordBuffer(self.layout, batch)

        def measure(offsets: list[int]) -> dict[str, float]:
            file = os.open(self._path, os.O_RDONLY)
            reader = open_reader(name, file, str(self._path), self.region)
            try:
                seconds = []
                for start in range(0, len(offsets), batch):
                    part = offsets[start : start + batch]
                    targets = [buffer.parts(slot) for slot in range(len(part))]
                    begin = perf_counter()
                    reader.read(part, targets)
                    seconds.append(perf_counter() - begin)
            finally:
                reader.close()
            return {
                "bytes_per_second": len(offsets) * self.region.record_bytes / sum(seconds),
                **{f"p{p}_us": percentile(seconds, p) * 1e6 for p in PERCENTILES},
            }

        return measure

    def by_fio(self, depth: int) -> Measure:
        """Measure fio with `depth` reads in flight, past the page cache."""

        def measure(offsets: list[int]) -> dict[str, float]:
            log = self._folder / "replay.log"
            size = self.region.stride  # as it must be a whole number of blocks
            reads = "".join(f"{self._path} read {offset} {size}\n" for offset in offsets)
            log.write_text(
                f"fio version 2 iolog\n{self._path} add\n{self._path} open\n{reads}"
                f"{self._path} close\n",
                "utf-8",
            )
            found = run_fio(
                f"--read_iolog={log}",
                f"--ioengine={'io_uring' if depth > 1 else 'psync'}",
                f"--iodepth={depth}",
            )
            latency = found["lat_ns"]["percentile"]
            return {
                "bytes_per_second": found["bw_bytes"] * self.region.record_bytes / size,
                **{f"p{p}_us": latency[f"{p:.6f}"] / 1e3 for p in PERCENTILES},
            }

        return measure


def run_fio(*options: str) -> dict[str, Any]:
    listed = ":".join(map(str, PERCENTILES))
    command = [
        *("fio", "--name=replay", "--direct=1", "--readonly", "--output-format=json"),
        *("--lat_percentiles=1", f"--percentile_list={listed}", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RequestError(f"fio failed: {(done.stderr or done.stdout).strip()}")
    report = json.loads(done.stdout[done.stdout.index("{") :])
    found: dict[str, Any] = report["jobs"][0]["read"]
    return found


def fio_version() -> str:
    done = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def working(storage: Storage, names: Sequence[str], batch: int) -> dict[str, Measure]:
    """The readers that work here; what refuses is said on stderr."""
    found = {}
    for name in names:
        measure = storage.by_reader(name, batch)
        try:
            measure([storage.region.start])
        except RequestError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            found[name] = measure
    return found


def compare(
    storage: Storage, methods: dict[str, Measure], rounds: Sequence[list[int]], figure: str
) -> dict[str, dict[str, Any]]:
    """Medians over the rounds of each method, and of `figure`'s ratio to that of fio."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    names = list(methods)
    for index, offsets in enumerate(rounds):
        methods["fio"](offsets)  # not counted
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            storage.drop_cache()
            results[name].append(methods[name](offsets))
    device = [each[figure] for each in results["fio"]]
    return {
        name: {
            **{key: median(each[key] for each in found) for key in found[0]},
            "ratio": median(each[figure] / fio for each, fio in zip(found, device, strict=True)),
        }
        for name, found in results.items()
    }


def offsets_of(region: Region, rounds: int, count: int, batch: int) -> list[list[int]]:
    """Distinct random records for each round, in the order of the file within each batch."""
    if rounds * count > region.count:
        raise RequestError(
            f"{rounds} rounds of {count} distinct records were asked for, the table has "
            f"{region.count}. Ask for fewer."
        )
    drawn = iter(random.sample(range(region.count), rounds * count))
    found = []
    for _ in range(rounds):
        records: list[int] = []
        while len(records) < count:
            size = min(batch, count - len(records))
            records += sorted(next(drawn) for _ in range(size))
        found.append([region.start + record * region.stride for record in records])
    return found


def report(storage: Storage, rounds: int, records: int, singles: int) -> dict[str, Any]:
    batches = {}
    for batch in BATCHES:
        methods = {"fio": storage.by_fio(64), **working(storage, BATCH_READERS, batch)}
        offsets = offsets_of(storage.region, rounds, records, batch)
        batches[str(batch)] = compare(storage, methods, offsets, "bytes_per_second")
    methods = {"fio": storage.by_fio(1), **working(storage, SINGLE_READERS, 1)}
    offsets = offsets_of(storage.region, rounds, singles, 1)
    return {
        "record_bytes": storage.region.record_bytes,
        "table_bytes": storage.region.size,
        "rounds": rounds,
        "batches": batches,
        "single": compare(storage, methods, offsets, "p50_us"),
        "environment": {
            "system": f"{platform.system()} {platform.release().split('-')[0]}",
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "fio": fio_version(),
        },
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"records of {found['record_bytes']:,} bytes, medians of {found['rounds']} rounds"]
    for batch, methods in found["batches"].items():
        lines.append(f"\n{'batches of ' + batch:<16}{'MB/s':>8}{'of fio':>8}")
        for name, row in methods.items():
            lines.append(f"{name:<16}{row['bytes_per_second'] / 1e6:8.0f}{row['ratio']:8.2f}")
        lines.append(verdict(methods, max, lambda ratio: ratio >= LEAST_RATIO, LEAST_RATIO))
    lines.append(f"\n{'single records':<16}{'p50 us':>8}{'p99 us':>8}{'of fio':>8}")
    for name, row in found["single"].items():
        lines.append(f"{name:<16}{row['p50_us']:8.0f}{row['p99_us']:8.0f}{row['ratio']:8.2f}")
    lines.append(verdict(found["single"], min, lambda ratio: ratio <= MOST_RATIO, MOST_RATIO))
    return "\n".join(lines)


def verdict(
    methods: dict[str, dict[str, Any]],
    best_of: Callable[..., Any],
    good: Callable[[float], bool],
    goal: float,
) -> str:
    ours = {name: row["ratio"] for name, row in methods.items() if name != "fio"}
    best = best_of(ours, key=ours.__getitem__)
    state = "met" if good(ours[best]) else "missed"
    return f"goal {goal}: {state} by {best} ({ours[best]:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=2048, help="of each round of batches")
    parser.add_argument("--singles", type=int, default=300, help="of each round of single records")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        if not shutil.which("fio"):
            raise RequestError("This compares with fio, which is not here: apt-get install fio.")
        with Artifact.open(given.artifact) as artifact, TemporaryDirectory() as folder:
            storage = Storage(artifact, Path(folder))
            found = report(storage, given.rounds, given.records, given.singles)
    except EdgeMemLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if given.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
