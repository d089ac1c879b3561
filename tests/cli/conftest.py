from __future__ import annotations

from pathlib import Path

import pytest

from support.checkpoints import MakeArtifact


@pytest.fixture
def artifact(make_artifact: MakeArtifact) -> Path:
    return make_artifact()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 5, encoding="utf-8")
    return path
