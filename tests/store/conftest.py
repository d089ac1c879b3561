from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.store import FakeExporter


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, with nothing in the environment that says otherwise; we are in it."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("EDGE_MEMLLM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> FakeExporter:
    """What exports instead of the real one, in no time."""
    import edge_memllm_export

    fake = FakeExporter()
    monkeypatch.setattr(edge_memllm_export, "export_model", fake, raising=False)
    return fake


@pytest.fixture
def source(home: Path) -> Path:
    """A folder that looks like a checkpoint."""
    folder = home / "my model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(5000))
    return folder


@pytest.fixture
def get(home: Path, exporter: FakeExporter) -> Callable[..., Path]:
    """``get(source, **options)`` with leave to export."""
    from edge_memllm.store import artifact_of

    def call(source: Any, **options: Any) -> Path:
        return artifact_of(source, options, lambda _: None)

    return call
