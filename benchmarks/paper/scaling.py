"""A checkpoint whose feed-forward outputs are scaled, layer by layer, without training.

The memory is scaled by the configuration's own gain; an FFN on the residual stream, which has no
such factor, by its last matrix.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from edge_memllm.modeling import MemoryLLMConfig

_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@contextmanager
def scaled(
    checkpoint: Path,
    *,
    memory: Sequence[float] | None = None,
    compute: Sequence[float] | None = None,
) -> Iterator[Path]:
    """Give a copy of a checkpoint with one factor per layer on FFN-M and on FFN-C (or Base's FFN).

    None leaves them as they are.
    """
    with tempfile.TemporaryDirectory(prefix="paper-") as scratch:
        out = Path(scratch, "checkpoint")
        out.mkdir()
        for name in _COPIED:
            if (checkpoint / name).exists():
                shutil.copy(checkpoint / name, out)
        fields = json.loads((checkpoint / "config.json").read_text("utf-8"))
        if memory is not None:
            own = fields.get("memory_gain") or [1.0] * len(memory)
            fields["memory_gain"] = [a * b for a, b in zip(own, memory, strict=True)]
        (out / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        weights = load_file(checkpoint / "model.safetensors")
        for layer, factor in enumerate(compute or ()):
            name = _last_matrix(MemoryLLMConfig.from_dict(fields), layer)
            weights[name] = weights[name] * factor
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        yield out


def _last_matrix(config: MemoryLLMConfig, layer: int) -> str:
    """The weight that the output of a layer's FFN-C is linear in, and no other layer's."""
    last = f"projections.{min(config.beta, 2) - 1}"
    part = "down_proj" if config.compute_form == "swiglu" else last
    return f"model.layers.{layer}.mlp.{part}.weight"


def all_but(layers: int, dropped: int) -> list[float]:
    """Return factors that leave every layer as it is but one, which gets nothing."""
    return [0.0 if layer == dropped else 1.0 for layer in range(layers)]
