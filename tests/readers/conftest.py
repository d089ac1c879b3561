from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def path(tmp_path: Path, random: np.random.Generator) -> Path:
    path = tmp_path / "table"
    path.write_bytes(random.bytes(6000))
    return path
