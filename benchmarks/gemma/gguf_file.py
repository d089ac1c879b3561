"""The same random Gemma 4 as a GGUF file, as llama.cpp's converter and its Q4_0 quantiser write it.

Q4_0 in every matrix, the embedding (which is the head) and the table included; the projection that
all layers share stays in bfloat16, as the quantiser leaves it; vectors are float32. The quantiser
by itself would give the head Q6_K: Q4_0 is faster, and is what ours has. There is no tokenizer in
it: tokens come and go as ids.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.gemma.shapes import Shape, config_of
from benchmarks.gemma.weights import chunks, tensor_shapes

TABLE = "per_layer_token_embd.weight"
_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": TABLE,
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_UNQUANTISED = "per_layer_model_projection.weight"
_NEVER = 1e30  # divides the frequency of pairs that a layer does not turn


def write_gguf(shape: Shape, seed: int, out: Path) -> None:
    """Write the new file `out`."""
    import gguf
    import numpy as np
    import torch
    from gguf.quants import quant_shape_to_byte_shape, quantize

    writer = gguf.GGUFWriter(out, "gemma4")
    _describe(writer, gguf, shape)
    sizes = tensor_shapes(shape)
    factors = _rotary_factors(shape)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, size in sizes.items():
        kind = _kind(gguf, name, size)
        stored = quant_shape_to_byte_shape(size, kind)
        length = math.prod(stored)
        if kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(_name(name), size, np.dtype(np.float32), math.prod(size) * 4)
        else:
            writer.add_tensor_info(_name(name), stored, np.dtype(np.uint8), length, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(factors)
    (stream,) = writer.fout or ()
    for name, size in sizes.items():
        # By rows: the library would want each tensor whole.
        kind, length = _kind(gguf, name, size), 0
        for rows in chunks(name, size, seed):
            data = quantize(rows.to(torch.float32).numpy(), kind)
            data.tofile(stream)
            length += data.nbytes
        writer.write_padding(stream, length)
    writer.close()


def table_place(file: Path) -> tuple[int, int]:
    """Where the table lies in a file: offset and length in bytes."""
    from gguf import GGUFReader

    found = next(each for each in GGUFReader(file).tensors if each.name == TABLE)
    return int(found.data_offset), int(found.n_bytes)


def _name(name: str) -> str:
    if not name.startswith("layers."):
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_NAMES[rest]}"


def _kind(gguf: Any, name: str, size: tuple[int, ...]) -> Any:
    if len(size) == 1:
        return gguf.GGMLQuantizationType.F32
    if name == _UNQUANTISED:
        return gguf.GGMLQuantizationType.BF16
    return gguf.GGMLQuantizationType.Q4_0


def _rotary_factors(shape: Shape) -> Any:
    """A quarter of the pairs turns in layers that see the whole text."""
    import numpy as np

    pairs = shape.whole_head // 2
    factors = np.full(pairs, _NEVER, np.float32)
    factors[: pairs // 4] = 1
    return factors


def _describe(writer: Any, gguf: Any, shape: Shape) -> None:
    text = config_of(shape)["text_config"]
    writer.add_vocab_size(shape.words)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden)
    writer.add_embedding_length_per_layer_input(shape.per_layer)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length([shape.inner_width(layer) for layer in range(shape.layers)])
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.whole_head)
    writer.add_value_length(shape.whole_head)
    writer.add_key_length_swa(shape.head)
    writer.add_value_length_swa(shape.head)
    writer.add_rope_dimension_count(shape.whole_head)
    writer.add_rope_dimension_count_swa(shape.head)
    writer.add_rope_freq_base(text["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(text["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern([k == "sliding_attention" for k in shape.layer_types])
    writer.add_shared_kv_layers(shape.shared)
    writer.add_final_logit_softcapping(text["final_logit_softcapping"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
