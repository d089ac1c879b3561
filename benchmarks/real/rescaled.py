"""A copy of a model of the llama family off its grid: other weights, the same function.

Channels are multiplied by random factors that cancel: between a norm and the matrices that read it,
value and output, up and down, the last norm and the head. No weight of a matrix stays a multiple of
its block's step, so whoever rounds it again has the work he would have with a trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weight = NDArray[np.float32]

SPREAD = 1.25  # factors lie between this and its inverse, evenly on a logarithmic scale
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def write_copy(source: Path, out: Path, seed: int) -> None:
    """Write a GGUF file with the source's weights rescaled and rounded to float16.

    The head becomes a matrix of its own, for the embedding keeps its values.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    weights = {
        each.name: np.array(gguf.dequantize(each.data, each.tensor_type), np.float32)
        for each in reader.tensors
    }
    weights.setdefault(_HEAD, weights[_EMBEDDING].copy())
    facts = {name: field.contents() for name, field in reader.fields.items()}
    shape = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    rescale(weights, facts["llama.block_count"], shape, seed)
    writer = gguf.GGUFWriter(out, "llama")
    _copy_facts(writer, reader)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, weight in weights.items():
        rounded = weight.astype(np.float16)
        writer.add_tensor(name, rounded.astype(np.float32) if weight.ndim == 1 else rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(copy: Path, out: Path) -> None:
    """Write the same weights as a folder of transformers, by its own reading of the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": copy.parent, "gguf_file": copy.name}
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        dtype=torch.float16, quantization_config=dense, **source
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def rescale(weights: dict[str, Weight], layers: int, heads: tuple[int, int], seed: int) -> None:
    """Rescale the channels of weights by GGUF's names, in place; `heads` are query's and value's.

    Norms are [D], matrices [out, in]; outputs of the value's matrix are read by all query heads
    that share it.
    """
    random = np.random.default_rng(seed)

    def factors(count: int) -> Weight:
        drawn = random.uniform(-1, 1, count) * np.log(SPREAD)
        return np.exp(drawn).astype(np.float32)

    for layer in range(layers):
        block = f"blk.{layer}"
        _through_norm(weights, f"{block}.attn_norm", ("q", "k", "v"), f"{block}.attn_", factors)
        _through_norm(weights, f"{block}.ffn_norm", ("gate", "up"), f"{block}.ffn_", factors)
        _through_value(weights, block, heads, factors)
        up = factors(len(weights[f"{block}.ffn_up.weight"]))
        weights[f"{block}.ffn_up.weight"] *= up[:, None]
        weights[f"{block}.ffn_down.weight"] /= up
    _through_norm(weights, "output_norm", ("output",), "", factors)


def _through_norm(
    weights: dict[str, Weight],
    norm: str,
    names: tuple[str, ...],
    prefix: str,
    factors: Callable[[int], Weight],
) -> None:
    scale = factors(len(weights[f"{norm}.weight"]))
    weights[f"{norm}.weight"] /= scale
    for name in names:
        weights[f"{prefix}{name}.weight"] *= scale


def _through_value(
    weights: dict[str, Weight],
    block: str,
    heads: tuple[int, int],
    factors: Callable[[int], Weight],
) -> None:
    query, value = heads
    outputs = len(weights[f"{block}.attn_v.weight"])
    scale = factors(outputs)
    weights[f"{block}.attn_v.weight"] *= scale[:, None]
    shared = np.repeat(scale.reshape(value, -1), query // value, axis=0).reshape(-1)
    weights[f"{block}.attn_output.weight"] /= shared


def _copy_facts(writer: Any, reader: Any) -> None:
    import gguf

    made_anew = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in made_anew:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)
