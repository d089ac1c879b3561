"""Where a step's time goes: ONNX Runtime's own profile of an artifact, summed up by operator.

    python benchmarks/step_profile.py ARTIFACT [--positions 128,1024] [--prefill 128] [--threads 2]

For each position it fills the cache with distinct tokens and decodes; with --prefill it profiles
one chunk of that many tokens at the start of a text. Medians over the steps. Profiling itself
takes 1 to 2 us per node, so the sum is a little more than an unprofiled step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edge_memllm.artifact import Artifact
from edge_memllm.feeding import Feeder
from edge_memllm.table import Table
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.ort import OrtRuntime
from edge_memllm_runtimes.ort_library import import_library

onnxruntime = import_library()
_MATRICES = ("MatMulNBits", "MatMul")


class ProfiledOptions(onnxruntime.SessionOptions):
    """Session options that always profile: the runtime makes its own and offers no such switch."""

    def __init__(self) -> None:
        super().__init__()
        self.enable_profiling = True
        self.profile_file_prefix = str(Path(tempfile.gettempdir()) / "step_profile")


def main() -> None:
    arguments = _arguments()
    onnxruntime.SessionOptions = ProfiledOptions
    positions = [int(each) for each in arguments.positions.split(",")]
    for position in positions:
        _print(f"decode at {position}", _profile(arguments, position, 1), arguments.steps)
    if arguments.prefill:
        _print(f"prefill of {arguments.prefill}", _profile(arguments, 0, arguments.prefill), 3)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--positions", default="128,1024")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def _profile(arguments: argparse.Namespace, position: int, tokens: int) -> list[dict[str, Any]]:
    """Events of the wanted steps alone: those before them have their own number of tokens."""
    with Artifact.open(arguments.artifact) as artifact:
        vocabulary = artifact.manifest.model.vocab_size
        ids = np.random.default_rng(0).permutation(vocabulary).tolist()
        runtime = OrtRuntime(artifact, "cpu", RuntimeOptions(threads=arguments.threads))
        session = runtime._open()  # its profile has no other door
        table = Table.open(artifact, "pread")
        repeats = arguments.steps if tokens == 1 else 3
        for repeat in range(1 if tokens == 1 else repeats):
            with Feeder(runtime, table, 1, 128 if tokens == 1 else tokens) as feeder:
                if position:
                    feeder.skip(0, ids[:position])
                if tokens == 1:
                    for token in ids[position : position + repeats]:
                        feeder.decode([token])
                else:
                    feeder.prefill(0, ids[repeat * tokens : (repeat + 1) * tokens])
        file = Path(session.end_profiling())
        table.close()
        runtime.close()
    events: list[dict[str, Any]] = json.loads(file.read_text())
    file.unlink()
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    first = runs[-repeats]
    return [event for event in events if event["ts"] >= first]


def _print(title: str, events: list[dict[str, Any]], repeats: int) -> None:
    times: dict[str, list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[_label(event)].append(event["dur"])
    step = median(event["dur"] for event in events if event["name"] == "model_run") / 1e3
    print(f"{title}: {step:.2f} ms a step")
    rows = [(name, len(each) / repeats, median(each)) for name, each in times.items()]
    for name, count, typical in sorted(rows, key=lambda row: -row[1] * row[2]):
        print(f"  {name:44} {count:5.0f} x {typical:8.1f} us = {count * typical / 1e3:8.2f} ms")


def _label(event: dict[str, Any]) -> str:
    """The operator; for a matrix also which one, out of the node's path."""
    kind = str(event["args"]["op_name"])
    path = [part for part in event["name"].split("/") if part]
    return f"{kind} {path[-2]}" if kind in _MATRICES and len(path) > 1 else kind


if __name__ == "__main__":
    main()
