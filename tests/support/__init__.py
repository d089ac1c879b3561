"""What tests of several folders share, and where the files beside them are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA, GOLDEN, HARNESS = (TESTS / name for name in ("data", "golden", "harness"))
