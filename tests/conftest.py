"""Shared fixtures: tiny random checkpoints of the whole family, built once per run, and more."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.checkpoints import MakeArtifact, MakeCheckpoint, write_checkpoint
from support.small_model import SmallArtifact, write_artifact, write_small_artifact

# Some tests import onnxruntime by themselves, before the product does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``make_checkpoint(beta=0, num_key_value_heads=4, ...) -> folder``, one folder per choice.

    ``dtype`` is the dtype on disk, ``seed`` that of the weights; the other keyword arguments are
    configuration fields. The folder is shared by all tests: copy it before changing it.
    """
    made: dict[str, Path] = {}

    def make(*, dtype: str = "float32", seed: int = 0, **fields: Any) -> Path:
        key = json.dumps([dtype, seed, fields], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint")
            write_checkpoint(made[key], dtype=dtype, seed=seed, **fields)
        return made[key]

    return make


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, beta 3, to be changed at will."""
    return Path(shutil.copytree(make_checkpoint(beta=3), tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def make_artifact(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint
) -> MakeArtifact:
    """``make_artifact(graph_weights="int4", table_codec="int8", beta=0, ...) -> folder``.

    Exported without verification, once per choice; what is not named is passed on to
    ``make_checkpoint``. The folder is shared by all tests: copy it before changing it.
    """
    made: dict[str, Path] = {}

    def make(
        *,
        graph_weights: str = "int4",
        table_codec: str = "int8",
        kv_dtype: str | None = None,
        **checkpoint: Any,
    ) -> Path:
        from edge_memllm_export import export_model

        key = json.dumps([graph_weights, table_codec, kv_dtype, checkpoint], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("export") / "artifact"
            export_model(
                make_checkpoint(**checkpoint),
                made[key],
                graph_weights=graph_weights,
                table_codec=table_codec,
                kv_dtype=kv_dtype,
                verify=False,
            )
        return made[key]

    return make


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def earlier_files_are_closed() -> None:
    """Files that earlier tests left to the collector are closed before open ones are counted."""
    gc.collect()


@pytest.fixture
def no_descriptor_is_left_open(earlier_files_are_closed: None) -> Iterator[None]:
    before = len(os.listdir("/dev/fd"))
    yield
    assert len(os.listdir("/dev/fd")) == before


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    """A small random artifact of the test's own."""
    return write_artifact(tmp_path / "artifact")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the byte-level tokenizer, for the fake runtime; one for each file."""
    return write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running `support.browser.Browser`."""
    from support.browser import running_browser

    with running_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A `FakeHub` that `huggingface_hub` speaks to, its caches in ``tmp_path``, where we are."""
    from support.hub import FakeHub, connect, serving

    monkeypatch.chdir(tmp_path)
    hub = FakeHub()
    with serving(hub):
        connect(hub, monkeypatch, tmp_path)
        yield hub
