"""Open artifacts with something changed in them, and see that none does harm.

    python -m benchmarks.fuzz [--count 100000] [--first 0] [--seed 0] [--artifact FOLDER]
    python -m benchmarks.fuzz --only NUMBER --keep FOLDER      one mutant again, left in FOLDER

Every mutant has one file changed (bytes, or a value, field or word of what it means), and in seven
of ten all digests are written again, so that they vouch for the change. It is loaded, two texts
are continued by four tokens and one chat is rendered, in a process that is used for many. What may
come of it:

    refused    an error of ours, by type
    same       the same answers: the change is in what no answer needs
    different  other answers. Fine where digests were rewritten (the content is then what its author
               wrote, as in any other artifact), a fault where they were not
    untyped    an error that is not ours
    crash      the process ended
    hang       no outcome within 10 seconds
    memory     more than 1 GiB beyond what the unchanged artifact takes; also a limit on the address
               space, beyond which allocations fail
    leak       descriptors stay open

Exit status 1 for any of the last five, and for a difference that no digest vouches for.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fuzz.artifact import make_artifact, read_files
from benchmarks.fuzz.mutants import make_mutant

_SECONDS = 10.0
_START_SECONDS = 120.0
# A process for so many: what a library keeps for good must not look like a mutant's doing.
_PER_PROCESS = 5000
WORKER = "benchmarks.fuzz.worker"
FAULTS = ("untyped", "crash", "hang", "memory", "leak")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artifact", type=Path, help="change this one instead of a new tiny one")
    parser.add_argument("--only", type=int, help="this mutant alone")
    parser.add_argument("--keep", type=Path, help="with --only: write its files into this folder")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        source = arguments.artifact or Path(scratch) / "artifact"
        if arguments.artifact is None:
            make_artifact(source)
        first, count = arguments.first, arguments.count
        if arguments.only is not None:
            first, count = arguments.only, 1
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True)
            for name, data in make_mutant(read_files(source), arguments.seed, first).files.items():
                (arguments.keep / name).write_bytes(data)
        return report(run(source, Path(scratch), arguments.seed, first, count))


def run(source: Path, scratch: Path, seed: int, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield what came of each mutant; a process that ends or hangs is replaced by another."""
    number, end = first, first + count
    folder = scratch / "mutant"
    folder.mkdir()
    while number < end:
        stop = min(end, number + _PER_PROCESS)
        for line in _lines(source, folder, seed, number, stop):
            yield line
            number = line["number"] + 1


def _lines(
    source: Path, folder: Path, seed: int, number: int, stop: int
) -> Iterator[dict[str, Any]]:
    """Yield the lines of one process, and a line of our own for a mutant that ended it."""
    command = [sys.executable, "-m", WORKER, str(source), str(folder)]
    command += map(str, (seed, number, stop))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    pipe, waiting, seconds = process.stdout.fileno(), b"", _START_SECONDS
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while number < stop:
                told = selector.select(seconds)
                data = os.read(pipe, 1 << 16) if told else b""
                if not data:
                    if seconds == _START_SECONDS:
                        raise RuntimeError(f"the worker did not start: {' '.join(command)}")
                    yield _ended(source, seed, number, "crash" if told else "hang", process)
                    return
                *texts, waiting = (waiting + data).split(b"\n")
                for text in texts:
                    seconds = _SECONDS
                    line = json.loads(text)
                    if "number" in line:
                        yield line
                        number = line["number"] + 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ended(
    source: Path, seed: int, number: int, what: str, process: subprocess.Popen[bytes]
) -> dict[str, Any]:
    mutant = make_mutant(read_files(source), seed, number)
    why = f"exit status {process.wait()}" if what == "crash" else f"beyond {_SECONDS:g} s"
    return {
        "number": number,
        "file": mutant.name,
        "how": mutant.how,
        "rewritten": mutant.rewritten,
        "what": what,
        "why": why,
        "seconds": 0.0,
    }


def is_fault(line: dict[str, Any]) -> bool:
    """Whether this must not come of any mutant."""
    return line["what"] in FAULTS or (line["what"] == "different" and not line["rewritten"])


def report(lines: Iterator[dict[str, Any]]) -> int:
    """Print faults as they come and counts at the end; return the exit status."""
    counts: Counter[tuple[str, bool, str]] = Counter()
    faults, slowest, start = 0, 0.0, time.perf_counter()
    for done, line in enumerate(lines, 1):
        counts[line["file"], line["rewritten"], line["what"]] += 1
        slowest = max(slowest, line["seconds"])
        if is_fault(line):
            faults += 1
            print(json.dumps(line), flush=True)
        if done % 5000 == 0:
            rate = done / (time.perf_counter() - start)
            print(f"{done} mutants, {rate:.0f} a second, {faults} faults", flush=True)
    for (file, rewritten, what), count in sorted(counts.items()):
        print(
            f"{file:24} digests {'rewritten' if rewritten else 'as they were':12} {what:10} {count}"
        )
    total = sum(counts.values())
    print(f"{total} mutants, {faults} faults, {slowest:.2f} s at most for one")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
