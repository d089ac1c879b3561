from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_memllm import Model
from support.engine import GatedRuntime
from support.small_model import open_small_model


@pytest.fixture
def runtime() -> GatedRuntime:
    return GatedRuntime()


@pytest.fixture
def model(folder: Path, runtime: GatedRuntime) -> Iterator[Model]:
    with open_small_model(folder, runtime) as opened:
        yield opened
