"""Overlays for the tests: specs, random edits, and what they should make of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_memllm.artifact.folder import Artifact
from edge_memllm.overlays import Edit, Overlay, OverlaySpec, overlay_of
from edge_memllm.overlays.table import OverlaidTable
from edge_memllm.table.table import Table
from support.small_model import IDENTITY, SmallArtifact

LAYERS, WIDTH = 2, 64


def spec(name: str = "a", **changes: Any) -> OverlaySpec:
    fields = {"identity": IDENTITY, "layers": LAYERS, "width": WIDTH, "codec": "f32", **changes}
    return OverlaySpec(name, **fields)


def row(seed: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def every_operation() -> list[Edit]:
    """One of each, two of them on one token."""
    return [
        Edit(3, 0, "replace", row(1)),
        Edit(3, 1, "blank"),
        Edit(7, 0, "scale", factor=-0.5),
        Edit(9, 1, "add", row(2)),
    ]


def applied(edits: list[Edit], rows: np.ndarray) -> np.ndarray:
    """What edits make of rows [V, L, D], by their definition."""
    rows = rows.copy()
    for edit in edits:
        at = (edit.token, edit.layer)
        match edit.operation:
            case "replace":
                rows[at] = edit.row
            case "add":
                rows[at] += edit.row
            case "scale":
                rows[at] *= np.float32(edit.factor)
            case "blank":
                rows[at] = 0
    return rows


def open_table(small: SmallArtifact, reader: str = "pread", **options: Any) -> Table:
    with Artifact.open(small.path) as artifact:
        return Table.open(artifact, reader, **options)


def laid_over(table: Any, *overlays: Overlay, **options: Any) -> OverlaidTable:
    return OverlaidTable(table, overlays, 24, **options)


def made(edits: list[Edit], name: str = "a", **changes: Any) -> Overlay:
    return overlay_of(spec(name, **changes), edits)
