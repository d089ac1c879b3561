"""A checkpoint whose FFN on the residual stream is scaled, layer by layer, without training.

The memory needs no such copy: its gain is a runtime's own (`interpretation/gained_runtime.py`). An
FFN-C, or Base's FFN, has no such factor, so its last matrix is scaled.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from edge_memllm.modeling import MemoryLLMConfig

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
        config = MemoryLLMConfig.from_pretrained(out)
        weights = load_file(checkpoint / "model.safetensors")
        for layer, factor in enumerate(factors):
            name = _last_matrix(config, layer)
            weights[name] = weights[name] * factor
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        yield out


def _last_matrix(config: MemoryLLMConfig, layer: int) -> str:
    """The weight that the output of a layer's FFN-C is linear in, and no other layer's."""
    last = f"projections.{min(config.beta, 2) - 1}"
    part = "down_proj" if config.compute_form == "swiglu" else last
    return f"model.layers.{layer}.mlp.{part}.weight"
