"""How much memory an export takes: peak anonymous and file-backed memory of the process.

    python benchmarks/export_memory.py CHECKPOINT OUT [any option of 'edge-memllm export' ...]

Prints one JSON object. Linux only: it samples /proc/PID/status of the export every 20 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_memllm.statistics import parse_proc_status

_PERIOD = 0.02


def main(checkpoint: str, out: str, *options: str) -> int:
    """Export in a child process and report its peaks; the child's exit code."""
    report = measured_export(Path(checkpoint), Path(out), options)
    print(json.dumps(report, indent=2))
    return int(report["exit_code"])


def measured_export(checkpoint: Path, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Export in a child process; return its exit code, times and peaks of memory."""
    words = ["export", str(checkpoint), str(out), *options]
    start, before = time.monotonic(), os.times()
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_memllm.cli.main", *words], stdout=subprocess.DEVNULL
    )
    anon = file = 0
    while child.poll() is None:
        memory = _memory(child.pid)
        anon, file = max(anon, memory[0]), max(file, memory[1])
        time.sleep(_PERIOD)
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return {
        "exit_code": child.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(_children(os.times()) - _children(before), 1),
        "checkpoint_bytes": weights,
        "peak_anonymous_bytes": anon,
        "peak_file_backed_bytes": file,
        "within_model_plus_1_gb": anon <= weights + 10**9,
    }


def _children(times: os.times_result) -> float:
    return times.children_user + times.children_system


def _memory(process: int) -> tuple[int, int]:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return 0, 0
    memory = parse_proc_status(status)
    return memory.anon_bytes or 0, memory.file_bytes or 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
