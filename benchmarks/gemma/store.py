"""What was measured, kept in docs/results/gemma.json: rounds as they are, one shape after another.

A round is written as soon as it is done, so that measuring can be ended and taken up again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.gemma.shapes import PUBLISHED

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "gemma.json"
ROUNDS, LIMITED, EXPORTS, SIZES = "rounds", "limited", "exports", "bytes"
COMPILED = "rounds, compiled"  # beside a llama.cpp that was compiled for the processor
_PACKAGES = ("edge-memllm", "onnxruntime", "xllamacpp", "llama-cpp-python", "numpy")


def stored() -> dict[str, Any]:
    """Everything so far: shape -> part -> figures."""
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return found


def part(shape: str, name: str, default: Any) -> Any:
    """One part of a shape's figures."""
    return stored().get(shape, {}).get(name, default)


def keep(shape: str, name: str, value: Any, threads: int) -> None:
    """Write one part of a published shape's figures, and where it was measured."""
    if shape not in PUBLISHED:
        return
    found = stored()
    of_shape = found.setdefault(shape, {})
    of_shape[name] = value
    of_shape["threads"] = threads
    of_shape["environment"] = environment(_PACKAGES)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
