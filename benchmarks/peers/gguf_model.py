"""A Llama folder as GGUF, and that GGUF in 4 bits: what llama.cpp runs.

The float16 file is written with the `gguf` package, the 4-bit file by llama.cpp's own quantiser.
There is no tokenizer in it: tokens come and go as ids.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_folder

if TYPE_CHECKING:
    import numpy as np

_HEADS = {"Q4_0": "GGML_TYPE_Q4_0", "Q6_K": "GGML_TYPE_Q6_K"}


def write_f16(folder: Path, out: Path) -> None:
    """Write a Llama folder as one GGUF file: matrices in float16, norms in float32."""
    import gguf
    import torch
    from safetensors import safe_open

    config, places = llama_folder.read(folder)
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


def quantize(source: Path, out: Path, head: str) -> None:
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
