"""How near requantising comes to the machine: to its disk, and to numpy turning float16 to float32.

    python benchmarks/requantize.py ARTIFACT OUT [--table-codec int4] [--rounds N]

In each round: a quarter of the source is read, as many bytes as the new table has are written and
forced to the disk, numpy turns float16 into float32 on one core, and `edge-memllm requantize` runs
in a process of its own, with the source's pages dropped from the page cache. Prints one JSON
object; its figures are medians over the rounds. Linux only: memory comes from /proc. OUT is
removed after each round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import numpy as np

from edge_memllm.artifact.folder import Artifact
from edge_memllm.statistics import parse_proc_status

_BLOCK = 16 << 20
_PERIOD = 0.02


def main() -> int:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table-codec", default="int4")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    each = [
        measure(arguments.artifact, arguments.out, arguments.table_codec)
        for _ in range(arguments.rounds)
    ]
    print(json.dumps({name: median(one[name] for one in each) for name in each[0]}, indent=2))
    return 0


def measure(source: Path, out: Path, codec: str) -> dict[str, float]:
    """One round: the limits, and a run beside them."""
    with Artifact.open(source) as artifact:
        manifest = artifact.manifest
        file = source / manifest.table.file
    values = manifest.model.vocab_size * manifest.layout.layers * manifest.layout.width
    converted = conversion_rate()
    reading = read_rate(file)
    drop_cache(file)
    seconds, anonymous = run(source, out, codec)
    with Artifact.open(out) as artifact:
        written = (out / artifact.manifest.table.file).stat().st_size
    shutil.rmtree(out)
    writing = write_rate(out.with_name(f"{out.name}.written"), written)
    read = file.stat().st_size
    return {
        "seconds": seconds,
        "peak_anonymous_bytes": anonymous,
        "source_bytes": read,
        "result_bytes": written,
        "source_bytes_per_second": read / seconds,
        "values_per_second": values / seconds,
        "disk_read_bytes_per_second": reading,
        "disk_write_bytes_per_second": writing,
        "numpy_values_per_second": converted,
        "source_rate_of_disk_write": read / seconds / writing,
        "disk_seconds_of_seconds": (read / reading + written / writing) / seconds,
        "values_of_numpy": values / seconds / converted,
    }


def run(source: Path, out: Path, codec: str) -> tuple[float, int]:
    """Seconds that requantising takes, and its peak of anonymous memory."""
    command = [sys.executable, "-m", "edge_memllm.cli.main", "requantize", str(source), str(out)]
    start, peak = perf_counter(), 0
    child = subprocess.Popen([*command, "--table-codec", codec], stdout=subprocess.DEVNULL)
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
            peak = max(peak, parse_proc_status(status).anon_bytes or 0)
        except OSError:  # it has just ended
            break
        sleep(_PERIOD)
    if child.wait():
        sys.exit(child.returncode)
    return perf_counter() - start, peak


def read_rate(path: Path) -> float:
    """Bytes per second that a file is read with, one block after the other, past the page cache.

    A quarter of it, from the middle on.
    """
    drop_cache(path)
    block, size = bytearray(_BLOCK), path.stat().st_size
    start = perf_counter()
    with path.open("rb", buffering=0) as file:
        file.seek(size // 2)
        while file.tell() < 3 * size // 4:
            file.readinto(block)
        read = file.tell() - size // 2
    return read / (perf_counter() - start)


def write_rate(path: Path, size: int) -> float:
    """Bytes per second that a file of this size is written with, one block after the other."""
    block = os.urandom(_BLOCK)
    start = perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // _BLOCK)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = perf_counter() - start
    path.unlink()
    return -(-size // _BLOCK) * _BLOCK / seconds


def conversion_rate() -> float:
    """Values per second that numpy turns from float16 to float32, from memory to memory."""
    values = np.ones(1 << 25, np.float16)
    target = np.empty(values.shape, np.float32)
    seconds = []
    for _ in range(5):
        start = perf_counter()
        target[:] = values
        seconds.append(perf_counter() - start)
    return len(values) / median(seconds)


def drop_cache(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
