"""A dense checkpoint of ours in the forms that the peers read: same weights, same names.

First an ordinary Hugging Face Llama, of which only the feed-forward width changes: 4-bit formats
hold blocks of 32 weights, and GGUF has no last block that is shorter, so zero rows and columns
widen it to the next multiple, which computes the same. One file per layer, so that little is in
memory. Of that folder a GGUF in float16, by the `gguf` package, and of that one in 4 bits, by
llama.cpp's own quantiser. There is no tokenizer in it: tokens come and go as ids.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# The axis of each feed-forward matrix that is as long as the layer is wide.
_WIDE_AXIS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
_HEADS = {"Q4_0": "GGML_TYPE_Q4_0", "Q6_K": "GGML_TYPE_Q6_K"}


def write_llama(checkpoint: Path, out: Path) -> None:
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


def _read_llama(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
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


def write_gguf(folder: Path, out: Path) -> None:
    """Write a Llama folder as one GGUF file: matrices in float16, norms in float32."""
    import gguf
    import torch
    from safetensors import safe_open

    config, places = _read_llama(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, "llama")
    _describe(writer, gguf, config)
    order = sorted(places, key=lambda name: (places[name], name))
    for name in order:
        shape, dtype = _form(folder / places[name], name)
        size = math.prod(shape) * dtype.itemsize
        theirs = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(theirs, shape, dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:
        with safe_open(folder / places[name], framework="pt") as weights:
            weight = weights.get_tensor(name)
        array = weight.to(torch.float32 if weight.ndim == 1 else torch.float16).numpy()
        writer.write_tensor_data(_in_their_order(name, array, config))
    writer.close()


def quantize_gguf(source: Path, out: Path, head: str) -> None:
    """Q4_0 in every matrix but the head, which is "Q4_0" too or "Q6_K" (llama.cpp's default)."""
    from llama_cpp import llama_cpp as library

    options = library.llama_model_quantize_default_params()
    options.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_0
    options.output_tensor_type = getattr(library, _HEADS[head])
    options.token_embedding_type = library.GGML_TYPE_Q4_0
    options.nthread = len(os.sched_getaffinity(0))
    code = library.llama_model_quantize(str(source).encode(), str(out).encode(), options)
    if code:
        raise RuntimeError(f"{source}: llama.cpp's quantiser returned {code}.")


def _describe(writer: Any, gguf: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")


def _form(file: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    import numpy as np
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        shape = tuple(weights.get_slice(name).get_shape())
    return shape, np.dtype(np.float32 if len(shape) == 1 else np.float16)


def _in_their_order(name: str, weight: Any, config: dict[str, Any]) -> Any:
    """GGUF's Llama rotates neighbouring pairs: rows of q and k are interleaved to match."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, config["head_dim"] // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape).copy()
