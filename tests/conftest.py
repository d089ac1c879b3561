"""Shared fixtures: tiny random checkpoints of the whole family, built once per test run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Some tests import onnxruntime by themselves, before the product does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

HIDDEN, LAYERS, HEADS, VOCABULARY, CONTEXT = 64, 2, 4, 300, 512
BOS, EOS, PAD = 256, 257, 258

MakeCheckpoint = Callable[..., Path]
MakeArtifact = Callable[..., Path]


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


def write_checkpoint(path: Path, *, dtype: str, seed: int, **fields: Any) -> None:
    """Write a tiny random checkpoint with a byte-level tokenizer into the folder ``path``."""
    import torch

    from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM

    torch.set_num_threads(1)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    network = MemoryLLMForCausalLM(MemoryLLMConfig(**{**defaults, **fields}))
    _fill(network, seed)
    network.to(getattr(torch, dtype)).save_pretrained(path)
    _byte_tokenizer().save(str(path / "tokenizer.json"))


def _fill(network: Any, seed: int) -> None:
    """Random weights of about unit gain, so that no layer is idle and logits are not flat."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(1 + 0.2 * noise)
            elif name in ("lm_head.weight", "model.embed_tokens.weight"):
                weight.copy_(noise * 2.5 / weight.shape[1] ** 0.5)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)


def _byte_tokenizer() -> Any:
    """One token per byte, then ``<s>``, ``</s>`` and ``<pad>``: any text, no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


def change_config(checkpoint: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's config.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A `FakeHub` that `huggingface_hub` speaks to, its caches in ``tmp_path``, where we are."""
    from fake_hub import FakeHub, connect, serving

    monkeypatch.chdir(tmp_path)
    hub = FakeHub()
    with serving(hub):
        connect(hub, monkeypatch, tmp_path)
        yield hub
