"""Trained runs on disk: which model of the family each one is, and what its training recorded.

A run is a folder NAME-sSEED as `edge-memllm train` leaves it. Its FFN on the residual stream can be
scaled, layer by layer, without training: the memory needs no such copy, its gain is a runtime's
own, but an FFN-C, or Base's FFN, has no such factor, so its last matrix is scaled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.paper.store import CHANGES, wider
from edge_memllm.modeling import MemoryLLMConfig, parameter_counts
from edge_memllm.modeling.configuration import memory_width

_NAME = re.compile(r"(?P<variant>.+)-s(?P<seed>\d+)")
_FILES = ("config.json", "model.safetensors", "training.json")


@dataclass(frozen=True)
class Run:
    """One trained model."""

    path: Path
    variant: str
    seed: int
    config: MemoryLLMConfig
    training: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def context(self) -> int:
        """Tokens of the sequences it was trained on: what it can be judged on."""
        return int(self.training["recipe"]["data"]["sequence_length"])

    def digest(self) -> str:
        """SHA-256 over configuration and weights."""
        found = hashlib.sha256()
        for name in ("config.json", "model.safetensors"):
            found.update((self.path / name).read_bytes())
        return found.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Shape and sizes; parameters are counted as the paper does, without the embedding."""
        config = self.config
        counts = parameter_counts(config)
        return {
            "beta": config.beta,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
            "compute_width": config.intermediate_size if config.has_compute else 0,
            "memory_width": config.memory_intermediate_size if config.has_memory else 0,
            "memory_rows": config.memory_layers,
            **{name: counts[name] for name in ("active", "memory", "total", "embedding")},
            "changes": changes(config),
        }


def changes(config: MemoryLLMConfig) -> list[str]:
    """What sets a configuration apart from the model of the family with its beta, in words."""
    plain = MemoryLLMConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        beta=config.beta,
    )
    found = [
        words
        for (field, value), words in CHANGES.items()
        if getattr(config, field, None) == value != getattr(plain, field, None)
    ]
    wide = config.memory_intermediate_size or 0
    usual = memory_width(config.hidden_size, config.beta)
    if config.has_memory and wide != usual:
        found.append(wider(wide / usual))
    return found


def read_runs(folder: Path) -> list[Run]:
    """Return the finished runs of a folder, by name; what is not finished is left out."""
    found = []
    for path in sorted(folder.iterdir()):
        named = _NAME.fullmatch(path.name)
        if named is None or not all((path / name).is_file() for name in _FILES):
            continue
        config = MemoryLLMConfig.from_pretrained(path)
        training = json.loads((path / "training.json").read_text("utf-8"))
        found.append(Run(path, named["variant"], int(named["seed"]), config, training))
    return found


_COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@contextmanager
def scaled_compute(checkpoint: Path, factors: Sequence[float]) -> Iterator[Path]:
    """Give a copy of a checkpoint with one factor per layer on FFN-C (or Base's FFN)."""
    with tempfile.TemporaryDirectory(prefix="paper-") as scratch:
        out = Path(scratch, "checkpoint")
        out.mkdir()
        for name in _COPIED:
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, out)
        weights = load_file(checkpoint / "model.safetensors")
        for layer, factor in enumerate(factors):
            name = _last_matrix(layer)
            weights[name] = weights[name] * factor
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        yield out


def _last_matrix(layer: int) -> str:
    """The weight that the output of a layer's FFN-C is linear in, and no other layer's."""
    return f"model.layers.{layer}.mlp.down_proj.weight"
