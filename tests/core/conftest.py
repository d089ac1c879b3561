from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_memllm import Model
from support.small_model import open_small_model


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    with open_small_model(folder) as opened:
        yield opened
