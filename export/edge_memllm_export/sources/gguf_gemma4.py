"""Gemma 4 in GGUF files: rows of tokens (E2B, E4B) or none, then keys may be values (31B).

Layers differ: those that see a window have other heads and angles than those that see the whole
text, the last ones read the keys and values of earlier ones and may be twice as wide inside.
What Gemma 3n has too is in `PerLayerNetwork`.
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
    Metadata,
    Parameter,
)

SLIDING, FULL = "sliding_attention", "full_attention"
_ROWS, _ROW_WIDTH = "per_layer_token_embd.weight", "embedding_length_per_layer_input"
_STANDS_STILL = 1e20  # what divides the frequency of a pair that does not turn, or more
SOFTCAP = 30.0  # llama.cpp's, where the file does not say
FOLLOWED = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", _ROW_WIDTH),
    *("attention.head_count", "attention.head_count_kv", "attention.shared_kv_layers"),
    *("attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("attention.causal", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "final_logit_softcapping"),
}
_OF_GEMMA_4 = {
    *("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"),
}
# Of every layer; then of those with keys and values of their own, and of those with rows.
_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_KEYS = {"attn_k": "k_proj", "attn_v": "v_proj", "attn_k_norm": "k_norm"}


class PerLayerNetwork:
    """What networks with rows of tokens have in common, names and shapes; see `Network`."""

    permuted = shifted_norms = False
    fields: Mapping[str, Any]

    def __init__(self, read: Metadata) -> None:
        self._read = read
        self._layers = read.count("block_count")
        self._types = self._layer_types()
        self._shared = read.count("attention.shared_kv_layers", 0, least=0)
        self._check_sources()

    @property
    def idle(self) -> Set[str]:
        """Keys and values of layers that read those of others, which some checkpoints carry."""
        shared = range(self._layers - self._shared, self._layers)
        return {f"blk.{layer}.{name}.weight" for layer in shared for name in _KEYS}

    def expected(self) -> Iterator[Parameter]:
        """Every parameter; see `Network`."""
        fields = self.fields
        width, vocabulary = fields["hidden_size"], fields["vocab_size"]
        yield Parameter("model.embed_tokens.weight", EMBEDDING, (vocabulary, width))
        yield Parameter("model.norm.weight", FINAL_NORM, (width,))
        if not fields["tie_word_embeddings"]:
            yield Parameter("lm_head.weight", HEAD, (vocabulary, width))
        if row := fields["hidden_size_per_layer_input"]:
            rows = self._layers * row
            of_rows: tuple[tuple[str, str, tuple[int, ...]], ...] = (
                ("embed_tokens_per_layer", "per_layer_token_embd", (vocabulary, rows)),
                ("per_layer_model_projection", "per_layer_model_proj", (rows, width)),
                ("per_layer_projection_norm", "per_layer_proj_norm", (row,)),
            )
            for theirs, ours, sizes in of_rows:
                yield Parameter(f"model.{theirs}.weight", f"{ours}.weight", sizes)
        for layer in range(self._layers):
            for name, own, shape in self.layer(layer):
                yield Parameter(f"model.layers.{layer}.{name}", f"blk.{layer}.{own}.weight", shape)

    def layer(self, layer: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """The parameters of a layer: transformers' names and the file's, and their shapes."""
        fields, inner = self.fields, self.inner(layer)
        width, row = fields["hidden_size"], fields["hidden_size_per_layer_input"]
        head, kv_heads = self.heads(layer)
        queries = fields["num_attention_heads"] * head
        for own, name in _NORMS.items():
            yield f"{name}.weight", own, (width,)
        yield "self_attn.q_proj.weight", "attn_q", (queries, width)
        yield "self_attn.q_norm.weight", "attn_q_norm", (head,)
        yield "self_attn.o_proj.weight", "attn_output", (width, queries)
        if layer < self._layers - self._shared:
            for own, name in _KEYS.items():
                shape = (head,) if name == "k_norm" else (kv_heads * head, width)
                yield f"self_attn.{name}.weight", own, shape
        yield "mlp.gate_proj.weight", "ffn_gate", (inner, width)
        yield "mlp.up_proj.weight", "ffn_up", (inner, width)
        yield "mlp.down_proj.weight", "ffn_down", (width, inner)
        if row:
            yield "per_layer_input_gate.weight", "inp_gate", (row, width)
            yield "per_layer_projection.weight", "proj", (width, row)
            yield "post_per_layer_input_norm.weight", "post_norm", (width,)

    def heads(self, layer: int) -> tuple[int, int]:
        """The width of a head in a layer, and how many there are of keys and values."""
        raise NotImplementedError

    def inner(self, layer: int) -> int:
        """The width of the feed-forward network of a layer."""
        raise NotImplementedError

    def common_fields(self) -> dict[str, Any]:
        """The configuration, as far as it is said alike."""
        read = self._read
        vocabulary = read.shape(EMBEDDING)[0]
        return {
            "attention_bias": False,
            "dtype": "float32",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": read.count("embedding_length"),
            "hidden_size_per_layer_input": read.count(_ROW_WIDTH, 0, least=0),
            "layer_types": self._types,
            "max_position_embeddings": read.count("context_length"),
            "num_attention_heads": read.count("attention.head_count"),
            "num_hidden_layers": self._layers,
            "num_kv_shared_layers": self._shared,
            "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
            "sliding_window": read.count("attention.sliding_window"),
            "tie_word_embeddings": HEAD not in read.shapes,
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
        }

    def check_heads(self, heads: int, kv_heads: int) -> None:
        """Refuse heads of which not equally many share keys and values."""
        if heads % kv_heads:
            self._read.refuse(
                f"{self._read.key('attention.head_count')} is {heads}, expected a multiple of "
                f"attention.head_count_kv, {kv_heads}."
            )

    def local_rotary(self) -> dict[str, Any]:
        """The angles of layers that see a window."""
        theta = self._read.number("rope.freq_base_swa", 1.0, 1e12, 10_000.0)
        return {"rope_type": "default", "rope_theta": theta}

    def _layer_types(self) -> list[str]:
        name = "attention.sliding_window_pattern"
        found, layers = self._read.get(name), self._layers
        right = isinstance(found, np.ndarray) and found.dtype == np.bool_ and len(found) == layers
        if not right or found[-1]:
            self._read.refuse(
                f"{self._read.key(name)} is {found!a:.60}, expected {layers} truth values, the "
                "last one false."
            )
        return [SLIDING if each else FULL for each in found]

    def _check_sources(self) -> None:
        """A layer that reads keys and values of others has one of its own kind before it."""
        first = self._layers - self._shared
        if first < 0 or not set(self._types[first:]) <= set(self._types[:first]):
            self._read.refuse(
                f"{self._read.key('attention.shared_kv_layers')} is {self._shared}, which leaves "
                "none whose keys and values the others could read."
            )


class Gemma4Network(PerLayerNetwork):
    """A network of Gemma 4; see `Network`."""

    def __init__(self, read: Metadata, rotary_factors: Floats | None) -> None:
        if read.get("expert_count"):
            read.refuse(
                f"{read.key('expert_count')} is {read.get('expert_count')!a:.20}: mixtures of "
                "experts such as Gemma 4 26B-A4B are not read.",
                "Take E2B, E4B or 31B.",
            )
        read.refuse_unfollowed(FOLLOWED | _OF_GEMMA_4)
        super().__init__(read)
        self._widths = {SLIDING: self._width("_swa"), FULL: self._width("")}
        self._keys_are_values = self._is_without_values()
        self._kv_heads = self._all_kv_heads()
        self.fields = self._fields(rotary_factors)

    def layer(self, layer: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """The parameters of a layer; keys that are values have a matrix of their own alone."""
        yield "layer_scalar", "layer_output_scale", (1,)
        without = self._keys_are_values and self._types[layer] == FULL
        for name, own, shape in super().layer(layer):
            if not (without and own == "attn_v"):
                yield name, own, shape

    def heads(self, layer: int) -> tuple[int, int]:
        """The width of a head in a layer, and how many there are of keys and values."""
        kind = self._types[layer]
        return self._widths[kind], self._kv_heads[kind]

    def inner(self, layer: int) -> int:
        """The width of the feed-forward network of a layer."""
        shared = layer >= self._layers - self._shared
        wide = self.fields["use_double_wide_mlp"] and shared
        return int(self.fields["intermediate_size"]) * (2 if wide else 1)

    def _fields(self, rotary_factors: Floats | None) -> dict[str, Any]:
        softcap = self._read.number("final_logit_softcapping", 0.0, 1e6, SOFTCAP)
        inner, double_wide = self._feed_forward()
        fields = self.common_fields() | {
            "architectures": ["Gemma4ForCausalLM"],
            "attention_k_eq_v": self._keys_are_values,
            "enable_moe_block": False,
            "final_logit_softcapping": softcap or None,
            "global_head_dim": self._widths[FULL],
            "head_dim": self._widths[SLIDING],
            "intermediate_size": inner,
            "model_type": "gemma4_text",
            "num_key_value_heads": self._kv_heads[SLIDING],
            "rope_parameters": {
                FULL: self._rotary(rotary_factors),
                SLIDING: self.local_rotary(),
            },
            "use_bidirectional_attention": None,
            "use_double_wide_mlp": double_wide,
        }
        if self._keys_are_values:
            fields["num_global_key_value_heads"] = self._kv_heads[FULL]
        for each in self._kv_heads.values():
            self.check_heads(fields["num_attention_heads"], each)
        return fields

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
            if self._types[layer] == FULL
        )

    def _all_kv_heads(self) -> dict[str, int]:
        """Heads of keys and values in layers of each type."""
        name = "attention.head_count_kv"
        counts = self._read.counts(name, self._layers)
        found = {
            kind: {n for n, each in zip(counts, self._types, strict=True) if each == kind}
            for kind in (SLIDING, FULL)
        }
        found[SLIDING] = found[SLIDING] or found[FULL]
        one = all(len(each) == 1 for each in found.values())
        if not one or not (self._keys_are_values or found[SLIDING] == found[FULL]):
            self._read.refuse(
                f"{self._read.key(name)} is {counts!a:.60}, expected one number, or where keys are "
                "values one for each type of layer."
            )
        return {kind: each.pop() for kind, each in found.items()}

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

    def _rotary(self, factors: Floats | None) -> dict[str, Any]:
        """The angles of layers that see the whole text: the first pairs turn alone."""
        pairs = self._widths[FULL] // 2
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
            "rope_type": "proportional",
            "partial_rotary_factor": turning / pairs,
            "rope_theta": self._read.number("rope.freq_base", 1.0, 1e12),
        }
