"""Kill exports with SIGKILL at random moments and look at what each leaves behind.

    python benchmarks/kill_export.py CHECKPOINT --kills 50

After every kill OUT must be complete or not there (complete or set aside, where an artifact was
being replaced), and the next export must succeed with the same bytes and leave nothing else.
Prints one line of JSON; exits 1 if anything was torn. Power cuts are not tested by this.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from edge_memllm.artifact import Artifact
from edge_memllm.errors import EdgeMemLLMError

# A server that has imported the exporter once, and forks a process for each export.
SPAWN = multiprocessing.get_context("forkserver")


def export(checkpoint: Path, out: Path, started: Connection) -> None:
    """Export as users do, judged, on a short text. Runs in a process of its own."""
    import torch

    from edge_memllm_export import export_model

    torch.set_num_threads(1)
    started.send(True)
    export_model(
        checkpoint,
        out,
        quality_text="All happy families are alike. " * 10,
        accept_quality_loss=True,
        overwrite=True,
    )


def run_export(checkpoint: Path, out: Path, kill_after: float | None) -> tuple[int | None, float]:
    """Run one export, killed after some seconds if asked: its exit code and how long it ran."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=export, args=(checkpoint, out, sender))
    process.start()
    sender.close()
    receiver.recv()
    start = time.perf_counter()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode, time.perf_counter() - start


def state(folder: Path) -> str:
    """What a reader would find: absent, complete or torn."""
    if not folder.exists():
        return "absent"
    try:
        with Artifact.open(folder) as artifact:
            artifact.verify_digests()
    except EdgeMemLLMError as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return "torn"
    return "complete"


def outcome(out: Path, replacing: bool) -> str:
    """What a kill left: absent, complete, aside (between two renames), or torn."""
    found = state(out)
    if found == "absent" and replacing:
        aside = state(out.with_name(f"{out.name}.replaced"))
        return "aside" if aside == "complete" else "torn"
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def kill_exports(checkpoint: Path, work: Path, kills: int, seed: int) -> dict[str, int | float]:
    """Kill that many exports; every second one replaces a complete artifact."""
    out = work / "out"
    code, seconds = run_export(checkpoint, out, None)
    if code != 0:
        raise SystemExit(f"the export that is to be killed fails by itself (exit code {code})")
    expected = content(out)
    chance = random.Random(seed)
    counts = Counter[str]()
    for number in range(kills):
        replacing = number % 2 == 1
        if not replacing:
            shutil.rmtree(out)
        run_export(checkpoint, out, chance.uniform(0, 1.1 * seconds))
        counts[outcome(out, replacing)] += 1
        counts["leftovers"] += out.with_name("out.partial").exists()
        code, _ = run_export(checkpoint, out, None)
        counts["recovered"] += (
            code == 0 and content(out) == expected and [e.name for e in work.iterdir()] == ["out"]
        )
    names = ("complete", "absent", "aside", "torn", "leftovers", "recovered")
    return {"kills": kills, "export_seconds": round(seconds, 3)} | {n: counts[n] for n in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    SPAWN.set_forkserver_preload(["edge_memllm_export.exporter"])
    with tempfile.TemporaryDirectory() as work:
        counts = kill_exports(arguments.checkpoint, Path(work), arguments.kills, arguments.seed)
    print(json.dumps(counts))
    return 0 if counts["torn"] == 0 and counts["recovered"] == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
