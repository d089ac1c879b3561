"""Memory of a loaded model against the estimate, at several lengths of text.

    python benchmarks/load_memory.py ARTIFACT [--positions 300 2030] [--packed-cache DIR]

Anonymous memory right after loading, and after a prompt of so many distinct tokens was computed
in chunks. Each length is measured in a process of its own. Sizes in MB (10^6 bytes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

_MB = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--positions", type=int, nargs="+", default=[300, 2030])
    parser.add_argument("--packed-cache", type=Path)
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measured(arguments, arguments.child)))
        return 0
    for count in arguments.positions:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for name, value in json.loads(done.stdout).items():
            print(f"{count:>6} positions  {name:<34}{value:>10}")
    return 0


def measured(arguments: argparse.Namespace, count: int) -> dict[str, float]:
    import edge_memllm
    from edge_memllm.feeding import Feeder
    from edge_memllm.statistics import process_memory

    start = time.perf_counter()
    model = edge_memllm.load(
        arguments.artifact,
        device="cpu",
        reader="pread",
        prefill_chunk=arguments.prefill_chunk,
        packed_cache=arguments.packed_cache,
    )
    seconds = time.perf_counter() - start
    loaded = process_memory()
    plan = model.describe()["memory"]
    tokens = np.random.default_rng(0).permutation(model.manifest.model.vocab_size)[:count].tolist()
    with model, Feeder(model.runtime, model.table, 1, model.prefill_chunk) as feeder:
        feeder.prefill(0, tokens[:-4])
        for token in tokens[-4:]:
            feeder.decode([token])
        worked = process_memory()
        per_position = plan["kv_position_bytes"] + plan["score_position_bytes"]
        estimate = plan["estimate_bytes"] + feeder.cache.capacity * per_position
    assert loaded.anon_bytes is not None and worked.anon_bytes is not None, "needs Linux"
    return {
        "load, seconds": round(seconds, 2),
        "anonymous after loading, MB": loaded.anon_bytes // _MB,
        "anonymous with the text, MB": worked.anon_bytes // _MB,
        "estimated with the text, MB": estimate // _MB,
        "mapped files, MB": (worked.file_bytes or 0) // _MB,
        "most resident ever, MB": (worked.peak_bytes or 0) // _MB,
    }


if __name__ == "__main__":
    sys.exit(main())
