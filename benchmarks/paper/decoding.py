"""Decoding speed and memory of the family at one size, against Base (the paper's Table 6).

Artifacts have random weights: speed does not depend on the text. Each model is measured in turns
with Base, by `edge-memllm bench --compare`, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.paper.store import FOLDER, Results
from edge_memllm.cli.synthetic import make_synthetic
from edge_memllm.modeling import parameter_counts, preset_config

BETAS = {"base": 8, "flex-3": 3, "flex-2": 2, "flex-1": 1, "memoryllm": 0}
_KEPT = (
    "decode_tokens_per_second",
    "decode_quartiles",
    "prefill_tokens_per_second",
    "rss_anon_bytes",
    "rss_file_bytes",
    "table_bytes_read_per_token",
    "reads_per_token",
    "cache",
    "reader",
    "threads",
    "context",
    "new_tokens",
    "model",
    "roofline",
)


def measure_decoding(
    preset: str, artifacts: Path, options: list[str], results: Path = FOLDER
) -> Iterator[str]:
    """Make the artifacts that are missing, compare each with Base, store; yield what was done.

    `options` are further words for `edge-memllm bench`.
    """
    paths = {name: artifacts / f"{preset}-{name}" for name in BETAS}
    for name, path in paths.items():
        if not path.exists():
            make_synthetic(preset, BETAS[name], path)
            yield f"made {path}"
    for name, path in paths.items():
        if name != "base":
            report = _bench(paths["base"], path, options)
            Results("decode", results).put(f"{preset}-{name}", _entry(preset, name, report))
            yield f"compared {name} with base"


def _bench(base: Path, other: Path, options: list[str]) -> dict[str, Any]:
    """B is Base, so the ratio is that of the other model to it."""
    words = ["bench", "--compare", str(other), str(base), "--json", *options]
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _entry(preset: str, name: str, report: dict[str, Any]) -> dict[str, Any]:
    cells = {cell["name"][0]: cell for cell in report["variants"]}
    config = preset_config(preset, BETAS[name])
    return {
        "preset": preset,
        "variant": name,
        "parameters": parameter_counts(config),
        "figures": {
            "model": {key: cells["A"][key] for key in _KEPT},
            "base": {key: cells["B"][key] for key in _KEPT},
            "ratios": report["comparisons"],
            "repeats": report["repeats"],
            "environment": report["environment"],
        },
    }
