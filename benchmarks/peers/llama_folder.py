"""A dense checkpoint of ours as an ordinary Hugging Face Llama: same weights, same names.

Only the feed-forward width changes. 4-bit formats hold blocks of 32 weights, and GGUF has no last
block that is shorter: zero rows and columns widen it to the next multiple, which computes the
same. One file per layer, so that little is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# The axis of each feed-forward matrix that is as long as the layer is wide.
_WIDE_AXIS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def write(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint (beta 8) into the new folder ``out``."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    if config["beta"] != 8:
        raise ValueError(f"{checkpoint}: beta is {config['beta']}; only a dense network (8) fits.")
    width = -(-config["intermediate_size"] // _BLOCK) * _BLOCK
    out.mkdir(parents=True)
    places: dict[str, str] = {}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        for file, names in _files(list(weights.keys())):
            tensors = {name: _widened(name, weights.get_tensor(name), width) for name in names}
            save_file(tensors, out / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    (out / "config.json").write_text(json.dumps(_config(config, width), indent=1), "utf-8")
    for name in _TOKENIZER_FILES:
        shutil.copy(checkpoint / name, out / name)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of a folder written here, and the file of each of its weights."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    return config, index["weight_map"]


def _files(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        parts = name.split(".")
        key = f"layer-{int(parts[2]):03}" if parts[1] == "layers" else parts[-2]
        groups.setdefault(f"{key}.safetensors", []).append(name)
    yield from sorted(groups.items())


def _widened(name: str, weight: Any, width: int) -> Any:
    axis = _WIDE_AXIS.get(name.split(".")[-2])
    if axis is None:
        return weight.contiguous()
    shape = list(weight.shape)
    shape[axis] = width
    wide = weight.new_zeros(shape)
    wide.narrow(axis, 0, weight.shape[axis]).copy_(weight)
    return wide


def _config(ours: dict[str, Any], width: int) -> dict[str, Any]:
    same = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("rope_parameters", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "dtype"),
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: ours[key] for key in same},
        "intermediate_size": width,
    }
