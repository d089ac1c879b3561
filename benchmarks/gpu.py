"""Everything that needs a CUDA device, in one command: the tests, then the benchmark, one report.

    python benchmarks/gpu.py [ARTIFACT] [--preset 250m] [--out gpu.md]

Runs `pytest -m gpu`, then `edge-memllm bench` on the device with the table cold, warm and
resident, each without and with a recorded decode step (CUDA graph), and on the CPU for
comparison. Without ARTIFACT one of random weights is made first. Exit code 1 if anything failed;
the report is written all the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHES = "cold,warm,resident"
VARIANTS = {
    "cuda": ["--device", "cuda", "--cache", CACHES],
    "cuda, recorded decode step": ["--device", "cuda", "--cuda-graph", "--cache", CACHES],
    "cpu": ["--device", "cpu", "--cache", CACHES],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("--preset", default="250m", help="made without ARTIFACT (default: 250m)")
    parser.add_argument("--new-tokens", default="128")
    parser.add_argument("--context", default="128,1024")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the report")
    arguments = parser.parse_args()
    if reason := without_device():
        print(f"gpu: nothing to run: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        artifact = arguments.artifact or synthetic(arguments.preset, Path(folder) / "artifact")
        sections = [tests(), *(measured(name, artifact, arguments) for name in VARIANTS)]
    failed = [title for title, good, _ in sections if not good]
    summary = f"failed: {', '.join(failed)}" if failed else "all passed"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, _, text in sections)
    arguments.out.write_text(f"# CUDA: {summary}\n\n{device()}\n\n{body}\n", encoding="utf-8")
    print(f"gpu: {summary}; report in {arguments.out}")
    return 1 if failed else 0


def without_device() -> str | None:
    """Why there is no CUDA here; a skipped test must not pass for one that ran."""
    from edge_memllm_runtimes.ort_library import import_library

    if "CUDAExecutionProvider" not in import_library().get_available_providers():
        return "this onnxruntime has no CUDAExecutionProvider, see docs/install.md"
    done = run("nvidia-smi", "-L")
    return None if done.returncode == 0 else "nvidia-smi finds no device"


def synthetic(preset: str, out: Path) -> Path:
    """Make an artifact of random weights; measure nothing yet."""
    command = ["bench", "--synthetic", preset, "--out", str(out), "--repeats", "1"]
    done = edge_memllm(*command, "--new-tokens", "2", "--device", "cpu")
    if done.returncode:
        sys.exit(f"gpu: no artifact of preset {preset}:\n{done.stderr}")
    return out


def tests() -> tuple[str, bool, str]:
    done = run(sys.executable, "-m", "pytest", "-m", "gpu", "-ra", "-q", str(ROOT / "tests"))
    good = done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout
    return "Tests", good, fenced(done.stdout[-8000:] + done.stderr[-2000:])


def measured(name: str, artifact: Path, arguments: argparse.Namespace) -> tuple[str, bool, str]:
    words = [*VARIANTS[name], "--context", arguments.context, "--new-tokens", arguments.new_tokens]
    done = edge_memllm("bench", str(artifact), *words, "--json")
    command = f"`edge-memllm bench ARTIFACT {' '.join(words)} --json`"
    if done.returncode:
        return name, False, f"{command}\n\n{fenced(done.stderr[-4000:])}"
    report: dict[str, Any] = json.loads(done.stdout)
    return name, True, f"{command}\n\n{fenced(json.dumps(report, indent=1), 'json')}"


def device() -> str:
    query = "name,driver_version,memory.total,compute_cap"
    return fenced(run("nvidia-smi", f"--query-gpu={query}", "--format=csv").stdout)


def edge_memllm(*words: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "edge_memllm.cli.main", *words)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def fenced(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


if __name__ == "__main__":
    sys.exit(main())
