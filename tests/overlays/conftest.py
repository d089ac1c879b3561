from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_memllm.overlays import write_overlay
from edge_memllm.table.table import Table
from support.overlays import every_operation, open_table, spec
from support.small_model import SmallArtifact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.overlay.safetensors"


@pytest.fixture
def written(path: Path) -> Path:
    write_overlay(path, spec(), every_operation())
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "o.overlay.safetensors"


@pytest.fixture
def table(small: SmallArtifact) -> Iterator[Table]:
    table = open_table(small)
    yield table
    table.close()
