"""What it costs to have the record of one token after the other, for each reader and record cache.

    python benchmarks/token_fetch.py ARTIFACT [--record-cache BYTES] [--tokens N] [--json]

Draws tokens with Zipf's frequencies (the n-th most frequent one has a share of 1/n), as text does
roughly, and fetches them one by one, verified. The first third is not counted: it fills the caches.
The table's page cache is dropped before each run. Start it inside a control group with a memory
limit to see what is left of the page cache then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np

from edge_memllm.artifact import Artifact
from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.readers.memory import available_memory
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Table

READERS = ("auto", "pread", "direct", "uring", "mmap")


def draw(vocabulary: int, count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens with Zipf's frequencies, the frequent ones scattered over the table."""
    share = 1 / np.arange(1, vocabulary + 1)
    order = np.random.default_rng(0).permutation(vocabulary)
    drawn = np.random.default_rng(seed).choice(vocabulary, count, p=share / share.sum())
    return order[drawn]


def measure(artifact: Artifact, reader: str, cache: int, count: int) -> dict[str, Any]:
    with os.fdopen(artifact.open_file(artifact.manifest.table.file)) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    table = Table.open(artifact, reader, record_cache_bytes=cache)
    try:
        buffer = RecordBuffer(table.layout, 1)
        seconds = []
        for token in draw(artifact.manifest.model.vocab_size, count, seed=1):
            wanted = np.array([token])
            start = perf_counter()
            table.fetch(wanted, buffer)
            seconds.append(perf_counter() - start)
        found = table.statistics
    finally:
        table.close()
    counted = seconds[count // 3 :]
    return {
        "reader": reader if reader == table.reader_name else f"{reader}: {table.reader_name}",
        "record_cache_bytes": cache,
        "mean_us": mean(counted) * 1e6,
        "median_us": median(counted) * 1e6,
        "p99_us": float(np.percentile(counted, 99)) * 1e6,
        "cache_hit_rate": found.cache_hits / count,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--record-cache", type=int, default=150_000_000, help="in bytes")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    try:
        with Artifact.open(given.artifact) as artifact:
            for cache in (0, given.record_cache):
                for reader in READERS:
                    try:
                        rows.append(measure(artifact, reader, cache, given.tokens))
                    except RequestError as error:
                        print(f"left out: {error}", file=sys.stderr)
    except EdgeMemLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    memory = available_memory()
    if given.json:
        print(json.dumps({"available_memory_bytes": memory, "rows": rows}, indent=2))
        return 0
    print(f"{memory or 0:,} bytes of memory available")
    print(f"{'reader':<14}{'cache MB':>9}{'mean us':>9}{'median':>9}{'p99':>9}{'hits':>7}")
    for row in rows:
        figures = (row["record_cache_bytes"] / 1e6, *(row[k] for k in list(row)[2:5]))
        print(f"{row['reader']:<14}" + "".join(f"{each:9.0f}" for each in figures), end="")
        print(f"{row['cache_hit_rate']:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
