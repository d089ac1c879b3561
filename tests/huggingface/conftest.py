from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import MakeArtifact, MakeCheckpoint
from support.hub import EXACT, NAME, FakeHub
from support.small_model import write_small_artifact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_artifact(tmp_path / "source").path


@pytest.fixture
def hub(empty_hub: FakeHub, folder: Path) -> FakeHub:
    """One artifact, and beside it a file that its manifest does not name."""
    empty_hub.add_folder(NAME, folder)["README.md"] = b"# words"
    return empty_hub


@pytest.fixture(scope="module")
def path(make_artifact: MakeArtifact) -> Path:
    return make_artifact(**EXACT)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Any]:
    """In chunks of 5 tokens, so that prompts here have several."""
    from edge_memllm.huggingface import EdgeMemLLMForCausalLM

    with EdgeMemLLMForCausalLM.from_pretrained(path, threads=1, prefill_chunk=5) as opened:
        yield opened


@pytest.fixture(scope="module")
def network(make_checkpoint: MakeCheckpoint) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_checkpoint()).eval()
