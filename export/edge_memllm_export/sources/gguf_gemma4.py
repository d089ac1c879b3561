"""Gemma 4 in GGUF files: rows of tokens (E2B, E4B) or none, then keys may be values (31B).

Layers differ: those that see a window have other heads and angles than those that see the whole
text, the last ones read the keys and values of earlier ones and may be twice as wide inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from edge_memllm.arrays import Floats
from edge_memllm_export.sources.gguf_metadata import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ROTARY_FACTORS,
    Expected,
    Metadata,
)

_ROWS, _ROW_WIDTH = "per_layer_token_embd.weight", "embedding_length_per_layer_input"
_SLIDING, _FULL = "sliding_attention", "full_attention"
_STANDS_STILL = 1e20  # what divides the frequency of a pair that does not turn, or more
_SOFTCAP = 30.0  # llama.cpp's, where the file does not say
_FOLLOWED = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", _ROW_WIDTH),
    *("attention.head_count", "attention.head_count_kv", "attention.shared_kv_layers"),
    *("attention.key_length", "attention.value_length", "attention.key_length_swa"),
    *("attention.value_length_swa", "attention.layer_norm_rms_epsilon", "attention.causal"),
    *("attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping"),
    *("rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa"),
}
# Of every layer; then of those with keys and values of their own, and of those with rows.
_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_KEYS = {"attn_k": "k_proj", "attn_v": "v_proj", "attn_k_norm": "k_norm"}


class Gemma4Network:
    """A network of the family; see `Network`."""

    permuted = shifted_norms = False

    def __init__(self, read: Metadata, rotary_factors: Floats | None) -> None:
        self._read = read
        if read.get("expert_count"):
            read.refuse(
                f"{read.key('expert_count')} is {read.get('expert_count')!a:.20}: mixtures of "
                "experts such as Gemma 4 26B-A4B are not read.",
                "Take E2B, E4B or 31B.",
            )
        read.refuse_unfollowed(_FOLLOWED)
        self._layers = read.count("block_count")
        self._types = self._layer_types()
        self._shared = read.count("attention.shared_kv_layers", 0, least=0)
        self._check_sources()
        self._widths = {_SLIDING: self._width("_swa"), _FULL: self._width("")}
        self._keys_are_values = self._is_without_values()
        self._kv_heads = self._heads()
        self.fields = self._fields(rotary_factors)

    @property
    def idle(self) -> Set[str]:
        """Keys and values of layers that read those of others, which some checkpoints carry."""
        shared = range(self._layers - self._shared, self._layers)
        return {f"blk.{layer}.{name}.weight" for layer in shared for name in _KEYS}

    def expected(self) -> Iterator[Expected]:
        """Every parameter; see `Network`."""
        fields = self.fields
        width, vocabulary = fields["hidden_size"], fields["vocab_size"]
        row = fields["hidden_size_per_layer_input"]
        yield "model.embed_tokens.weight", EMBEDDING, (vocabulary, width)
        yield "model.norm.weight", FINAL_NORM, (width,)
        if not fields["tie_word_embeddings"]:
            yield "lm_head.weight", HEAD, (vocabulary, width)
        if row:
            rows = self._layers * row
            yield "model.embed_tokens_per_layer.weight", _ROWS, (vocabulary, rows)
            projection = "model.per_layer_model_projection.weight"
            yield projection, "per_layer_model_proj.weight", (rows, width)
            yield "model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight", (row,)
        for layer in range(self._layers):
            ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
            for name, own, shape in self._layer(layer):
                yield f"{theirs}.{name}", f"{ours}.{own}.weight", shape

    def _layer(self, layer: int) -> Iterator[Expected]:
        """The parameters of a layer, without its number."""
        fields, kind = self.fields, self._types[layer]
        width, row = fields["hidden_size"], fields["hidden_size_per_layer_input"]
        head, inner = self._widths[kind], self._inner(layer)
        queries = fields["num_attention_heads"] * head
        for own, name in _NORMS.items():
            yield f"{name}.weight", own, (width,)
        yield "layer_scalar", "layer_output_scale", (1,)
        yield "self_attn.q_proj.weight", "attn_q", (queries, width)
        yield "self_attn.q_norm.weight", "attn_q_norm", (head,)
        yield "self_attn.o_proj.weight", "attn_output", (width, queries)
        if layer < self._layers - self._shared:
            for own, name in _KEYS.items():
                if name != "v_proj" or kind == _SLIDING or not self._keys_are_values:
                    rows = (self._kv_heads[kind] * head, width)
                    shape = (head,) if name == "k_norm" else rows
                    yield f"self_attn.{name}.weight", own, shape
        yield "mlp.gate_proj.weight", "ffn_gate", (inner, width)
        yield "mlp.up_proj.weight", "ffn_up", (inner, width)
        yield "mlp.down_proj.weight", "ffn_down", (width, inner)
        if row:
            yield "per_layer_input_gate.weight", "inp_gate", (row, width)
            yield "per_layer_projection.weight", "proj", (width, row)
            yield "post_per_layer_input_norm.weight", "post_norm", (width,)

    def _inner(self, layer: int) -> int:
        shared = layer >= self._layers - self._shared
        wide = self.fields["use_double_wide_mlp"] and shared
        return int(self.fields["intermediate_size"]) * (2 if wide else 1)

    def _fields(self, rotary_factors: Floats | None) -> dict[str, Any]:
        read = self._read
        softcap = read.number("final_logit_softcapping", 0.0, 1e6, _SOFTCAP)
        vocabulary = read.shape(EMBEDDING)[0]
        inner, double_wide = self._feed_forward()
        fields = {
            "architectures": ["Gemma4ForCausalLM"],
            "attention_bias": False,
            "attention_k_eq_v": self._keys_are_values,
            "dtype": "float32",
            "enable_moe_block": False,
            "final_logit_softcapping": softcap or None,
            "global_head_dim": self._widths[_FULL],
            "head_dim": self._widths[_SLIDING],
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": read.count("embedding_length"),
            "hidden_size_per_layer_input": read.count(_ROW_WIDTH, 0, least=0),
            "intermediate_size": inner,
            "layer_types": self._types,
            "max_position_embeddings": read.count("context_length"),
            "model_type": "gemma4_text",
            "num_attention_heads": read.count("attention.head_count"),
            "num_hidden_layers": self._layers,
            "num_key_value_heads": self._kv_heads[_SLIDING],
            "num_kv_shared_layers": self._shared,
            "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
            "rope_parameters": self._rotary(rotary_factors),
            "sliding_window": read.count("attention.sliding_window"),
            "tie_word_embeddings": HEAD not in read.shapes,
            "use_bidirectional_attention": None,
            "use_double_wide_mlp": double_wide,
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
        }
        if self._keys_are_values:
            fields["num_global_key_value_heads"] = self._kv_heads[_FULL]
        self._check_heads(fields["num_attention_heads"])
        return fields

    def _layer_types(self) -> list[str]:
        name = "attention.sliding_window_pattern"
        found, layers = self._read.get(name), self._layers
        right = isinstance(found, np.ndarray) and found.dtype == np.bool_ and len(found) == layers
        if not right or found[-1]:
            self._read.refuse(
                f"{self._read.key(name)} is {found!a:.60}, expected {layers} truth values, the "
                "last one false."
            )
        return [_SLIDING if each else _FULL for each in found]

    def _check_sources(self) -> None:
        """A layer that reads keys and values of others has one of its own kind before it."""
        first = self._layers - self._shared
        if first < 0 or not set(self._types[first:]) <= set(self._types[:first]):
            self._read.refuse(
                f"{self._read.key('attention.shared_kv_layers')} is {self._shared}, which leaves "
                "none whose keys and values the others could read."
            )

    def _width(self, which: str) -> int:
        """The width of a head in layers of one type."""
        width = self._read.count(f"attention.key_length{which}")
        for name in (f"attention.value_length{which}", f"rope.dimension_count{which}"):
            self._read.expect_count(name, width, f"as attention.key_length{which}")
        return width

    def _is_without_values(self) -> bool:
        """Whether the layers that see the whole text have no matrix of values, none of them."""
        return not any(
            f"blk.{layer}.attn_v.weight" in self._read.shapes
            for layer in range(self._layers - self._shared)
            if self._types[layer] == _FULL
        )

    def _heads(self) -> dict[str, int]:
        """Heads of keys and values in layers of each type."""
        name = "attention.head_count_kv"
        counts = self._read.counts(name, self._layers)
        found = {
            kind: {n for n, each in zip(counts, self._types, strict=True) if each == kind}
            for kind in (_SLIDING, _FULL)
        }
        found[_SLIDING] = found[_SLIDING] or found[_FULL]
        one = all(len(each) == 1 for each in found.values())
        if not one or not (self._keys_are_values or found[_SLIDING] == found[_FULL]):
            self._read.refuse(
                f"{self._read.key(name)} is {counts!a:.60}, expected one number, or where keys are "
                "values one for each type of layer."
            )
        return {kind: each.pop() for kind, each in found.items()}

    def _check_heads(self, heads: int) -> None:
        for each in self._kv_heads.values():
            if heads % each:
                self._read.refuse(
                    f"{self._read.key('attention.head_count')} is {heads}, expected a multiple of "
                    f"attention.head_count_kv, {each}."
                )

    def _feed_forward(self) -> tuple[int, bool]:
        """The width of the feed-forward network, and whether it is twice that in shared layers."""
        name = "feed_forward_length"
        widths = self._read.counts(name, self._layers)
        own = self._layers - self._shared
        for factor in (1, 2):
            if widths == [widths[0]] * own + [factor * widths[0]] * self._shared:
                return widths[0], factor == 2
        return self._read.refuse(
            f"{self._read.key(name)} is {widths!a:.60}, expected one width, or twice it in the "
            f"last {self._shared} layers."
        )

    def _rotary(self, factors: Floats | None) -> Mapping[str, Any]:
        """Angles of both types: where the whole text is seen, the first pairs turn alone."""
        pairs = self._widths[_FULL] // 2
        if factors is None:
            self._read.shape(ROTARY_FACTORS)
        assert factors is not None  # as the tensor is there
        turning = int((factors == 1).sum())
        if factors.shape != (pairs,) or not (
            (factors[:turning] == 1).all() and (factors[turning:] >= _STANDS_STILL).all()
        ):
            self._read.refuse(
                f"{ROTARY_FACTORS} has other factors than {pairs}, the first ones 1 and all others "
                f"{_STANDS_STILL:g} or more."
            )
        return {
            _FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": turning / pairs,
                "rope_theta": self._read.number("rope.freq_base", 1.0, 1e12),
            },
            _SLIDING: {
                "rope_type": "default",
                "rope_theta": self._read.number("rope.freq_base_swa", 1.0, 1e12, 10_000.0),
            },
        }
