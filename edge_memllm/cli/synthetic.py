"""Artifacts with random weights, for measurements: their text is noise, their speed is not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from edge_memllm.errors import EdgeMemLLMError, RequestError

_STDERR = 2
_PROCESSOR = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


def make_synthetic(preset: str, beta: int | None, out: Path) -> None:
    """Write a random checkpoint of ``preset`` and export it, in processes of their own.

    So the memory measured afterwards is the runtime's alone. Needs as much memory as any export:
    the checkpoint in float16 and about a gigabyte.
    """
    if out.exists():
        raise RequestError(f"{out}: exists already. Measure it: edge-memllm bench {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.checkpoint-", dir=out.parent) as folder:
        shape = ["--preset", preset] if beta is None else ["--preset", preset, "--beta", str(beta)]
        small = ["--set", "training.save_dtype=float16"]
        run_step("train", *shape, "--steps", "0", "--out", folder, *small)
        fast = ("--no-verify", "--graph-method", "rtn", "--compute-dtype", _fast_dtype())
        run_step("export", folder, str(out), *fast)


def run_step(*words: str) -> None:
    """Run one of our commands in a process of its own; what it prints goes to stderr."""
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    done = subprocess.run(command, stdout=_STDERR, check=False)
    if done.returncode:
        raise EdgeMemLLMError(
            f"'edge-memllm {words[0]}' ended with exit code {done.returncode}; it said why above."
        )


def _fast_dtype(processor: Path = _PROCESSOR) -> str:
    """The arithmetic for the rows: bfloat16 is several times faster only where it is built in."""
    try:
        words = set(processor.read_text(encoding="utf-8").split())
    except OSError:
        return "float32"
    return "bfloat16" if words & _BFLOAT16 else "float32"
