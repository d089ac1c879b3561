"""GGUF files of tiny random networks, written by the gguf library as llama.cpp's converter would.

The converter's rules are said here once more, so that the reader is judged by them: rows of
queries and keys interleaved (llama), one added to norms (gemma3), transformers' names changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from edge_memllm_export.sources.gguf_file import GGUFFile

VOCABULARY, WIDTH, HEADS, KEYS, HEAD, INNER, LAYERS = 96, 64, 4, 2, 32, 96, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": HEAD,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 4096,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"post_attention_layernorm": "ffn_norm"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def random_model(model_type: str, **fields: Any) -> Any:
    """A network of transformers with random weights, norms and biases; in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def metadata_of(architecture: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a network of `SIZES`; a change to None leaves a key out."""
    names = {
        "context_length": SIZES["max_position_embeddings"],
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEYS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10_000.0,
    }
    found = {f"{architecture}.{name}": value for name, value in names.items()}
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def byte_tokens() -> dict[str, Any]:
    """A tokenizer's metadata: a token for each byte, one of two, and the end of a text."""
    tokens = [*bytes_to_unicode().values(), "th", "<|im_end|>"]
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def stored_tensors(architecture: str, model: Any) -> dict[str, np.ndarray]:
    """The tensors of a file, by the file's names, in float32."""
    names = _NAMES | (_SANDWICH if architecture == "gemma3" else _NORMS)
    tied = model.config.tie_word_embeddings
    found = {}
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        weight = value.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = permuted(weight)
        if architecture == "gemma3" and stem.endswith("norm"):
            weight = weight + np.float32(1)
        parts = stem.split(".", 3)
        if len(parts) == 4:
            found[f"blk.{parts[2]}.{names[parts[3]]}.{kind}"] = weight
        else:
            found[f"{names[stem]}.{kind}"] = weight
    return found


def permuted(weight: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp's rotary form wants them."""
    halves = weight.reshape(-1, 2, HEAD // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Write a file; matrices are quantised to `kind`, vectors stay as they are.

    `kinds` are of some tensors by name; a matrix of uint8 holds blocks of its kind already.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, _listed(value), _type_of(value), _element_type(value))
    for name, tensor in tensors.items():
        own = (kinds or {}).get(name, kind)
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        elif tensor.dtype == np.uint8:
            writer.add_tensor(name, tensor, raw_dtype=own)
        else:
            writer.add_tensor(name, quantize(tensor, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """The network with its matrices as `kind` holds them, changed in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(dequantize(stored, kind)))
    return model


def built(file: GGUFFile) -> Any:
    """Transformers' network of the file's configuration and weights."""
    fields = dict(file.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(file.read(name)) for name in file.names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _type_of(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, list | np.ndarray):
        return gguf.GGUFValueType.ARRAY
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def _element_type(value: Any) -> gguf.GGUFValueType | None:
    if not isinstance(value, np.ndarray):
        return None
    types = {"f": "FLOAT32", "i": "INT32", "u": "UINT32", "b": "BOOL"}
    return gguf.GGUFValueType[types[value.dtype.kind]]
