"""What options of ONNX Runtime's session give: speed, memory, latency of a cold record.

    python benchmarks/session_options.py ARTIFACT [--rounds 3]

Each option is measured in a process of its own, in turn, round by round: a prompt of 256 distinct
tokens, then 64 decode steps, the record of each taken out of the page cache just before it is
read. A sample waits until the machine is idle, and is dropped if others used it meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "force_spinning_stop": {"session.force_spinning_stop": "1"},
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "dynamic_block_base 4": {"session.dynamic_block_base": "4"},
    "device allocator for weights": {"session.use_device_allocator_for_initializers": "1"},
    "no memory arena": {"enable_cpu_mem_arena": False},
    "no memory pattern": {"enable_mem_pattern": False},
    "no graph optimisation": {"level": "ORT_DISABLE_ALL"},
    "basic graph optimisation": {"level": "ORT_ENABLE_BASIC"},
    "extended graph optimisation": {"level": "ORT_ENABLE_EXTENDED"},
}
_PROMPT, _STEPS = 256, 64
_AROUND = 1 << 20  # the page cache holds runs of pages: drop what lies around a record as well
_DISTURBED = 0.04
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        name, seed = arguments.child
        print(json.dumps(sample(arguments.artifact, OPTIONS[name], int(seed))))
        return 0
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    number = 0
    for _ in range(arguments.rounds):
        for name in OPTIONS:
            while True:
                number += 1
                figures = undisturbed(arguments.artifact, name, number)
                if figures is not None:
                    found[name].append(figures)
                    break
    for name, samples in found.items():
        print(name, {key: round(median(each[key] for each in samples), 2) for key in samples[0]})
    return 0


def undisturbed(artifact: Path, name: str, seed: int) -> dict[str, float] | None:
    """One sample, or None if other programs took more than a few hundredths of the machine."""
    while share_of_others(time.sleep, 0.5) > _DISTURBED:
        pass
    command = [sys.executable, __file__, str(artifact), "--child", name, str(seed)]
    output: list[str] = []

    def run(_: float) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        output.append(done.stdout)

    if share_of_others(run, 0) > _DISTURBED:
        return None
    figures: dict[str, float] = json.loads(output[0])
    return figures


def share_of_others(act: Any, argument: float) -> float:
    """The share of the machine's time that was used meanwhile, but not by `act`."""
    before, own = ticks(), sum(os.times()[2:4])
    act(argument)
    after, own = ticks(), sum(os.times()[2:4]) - own
    return max(0.0, after[0] - before[0] - own * _TICKS) / max(1, after[1] - before[1])


def ticks() -> tuple[int, int]:
    """Busy and all ticks of all processors since the start."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def sample(path: Path, options: dict[str, Any], seed: int) -> dict[str, float]:
    import edge_memllm
    from edge_memllm.feeding import Feeder
    from edge_memllm.statistics import process_memory

    apply(options)
    start = time.perf_counter()
    model = edge_memllm.load(path, device="cpu", reader="pread")
    figures = {"load_s": time.perf_counter() - start}
    tokens = np.random.default_rng(seed).permutation(model.manifest.model.vocab_size).tolist()
    with model, Feeder(model.runtime, model.table, 1, model.prefill_chunk) as feeder:
        feeder.prefill(0, tokens[-32:])
        feeder.cache.truncate(0, 0)
        start = time.perf_counter()
        feeder.prefill(0, tokens[:_PROMPT])
        figures["prefill_tokens_per_s"] = _PROMPT / (time.perf_counter() - start)
        reads, steps = decode(feeder, model, path, tokens[_PROMPT : _PROMPT + _STEPS])
        memory = process_memory()
    figures["decode_tokens_per_s"] = 1 / median(steps)
    figures["cold_read_ms"] = median(reads) * 1e3
    figures["cold_read_p90_ms"] = sorted(reads)[len(reads) * 9 // 10] * 1e3
    figures["anonymous_mb"] = (memory.anon_bytes or 0) / 1e6
    return figures


def decode(
    feeder: Any, model: Any, path: Path, tokens: list[int]
) -> tuple[list[float], list[float]]:
    """Seconds of each read and of each step."""
    spec = model.manifest.table
    reads: list[float] = []
    steps: list[float] = []
    fetch = model.table.fetch

    def timed(*arguments: Any) -> int:
        start = time.perf_counter()
        count: int = fetch(*arguments)
        reads.append(time.perf_counter() - start)
        return count

    model.table.fetch = timed
    file = os.open(path / spec.file, os.O_RDONLY)
    for token in tokens:
        place = max(0, spec.records_offset + token * spec.stride - _AROUND) & ~4095
        os.posix_fadvise(file, place, 3 * _AROUND, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        feeder.decode([token])
        steps.append(time.perf_counter() - start)
    os.close(file)
    return reads, steps


def apply(options: dict[str, Any]) -> None:
    """Let every session that is opened have these options."""
    from edge_memllm_runtimes.ort_library import import_library

    onnxruntime = import_library()
    real = onnxruntime.InferenceSession

    def session(path: str, settings: Any, **more: Any) -> Any:
        for name, value in options.items():
            if name.startswith("session."):
                settings.add_session_config_entry(name, value)
            elif name == "level":
                level = getattr(onnxruntime.GraphOptimizationLevel, value)
                settings.graph_optimization_level = level
            else:
                setattr(settings, name, value)
        return real(path, settings, **more)

    onnxruntime.InferenceSession = session


if __name__ == "__main__":
    sys.exit(main())
