"""Calls of the system that fail, and kills: a small part of what benchmarks/faults.py tries.

Every operation ends well or with an error of ours, and leaves what was there or all that is new.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.checkpoints import MakeCheckpoint

if sys.platform != "linux" or shutil.which("gcc") is None:
    pytest.skip("needs Linux and gcc", allow_module_level=True)

FAULTS = ROOT / "benchmarks" / "faults.py"


def tried(checkpoint: Path, *words: str) -> dict[str, dict[str, Any]]:
    """What faults.py counts, by operation; it must have nothing to complain about."""
    command = [sys.executable, str(FAULTS), str(checkpoint), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = [json.loads(line) for line in done.stdout.splitlines()]
    return {each["operation"]: each for each in counts}


def test_calls_that_fail_tear_nothing(make_checkpoint: MakeCheckpoint) -> None:
    """The first of each kind, once and from there on."""
    names = ("export", "overlay", "session")
    few = ("--kinds", "fsync,rename", "--most", "1")
    counts = tried(make_checkpoint(), "--operations", ",".join(names), *few)
    assert set(counts) == set(names)
    assert all(each["errors"] == each["faults"] == 16 for each in counts.values())


def test_kills_tear_nothing_and_the_next_run_leaves_nothing(
    make_checkpoint: MakeCheckpoint,
) -> None:
    counts = tried(make_checkpoint(), "--kills", "2")
    assert set(counts) == {"export", "requantize", "overlay", "session"}
    assert all(each["kills"] == 2 for each in counts.values())
