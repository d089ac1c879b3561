"""Dense networks in GGUF files whose layers are alike: Llama, Qwen 2 and 3, Gemma 3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_memllm.arrays import Doubles, Floats
from edge_memllm_export.sources.gguf_metadata import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ROTARY_FACTORS,
    Metadata,
    Parameter,
)

_LLAMA_ROTARY = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_CONTEXTS = (8192, 4096, 2048, 16384, 32768)  # the first is that of all of Llama 3
_GEMMA_PATTERN = 6  # one layer of so many sees the whole text, where the file does not say
_GEMMA_27B_LAYERS = 62  # the one size whose attention is scaled by the width a head would have

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_PRE_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
_SANDWICH_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_INPUT_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_ATTENTION_BIASES = {**_INPUT_BIASES, "attn_output.bias": "self_attn.o_proj.bias"}
_FEED_FORWARD_BIASES = {
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True)
class Family:
    """What the files of one architecture hold, and what transformers calls it.

    Attributes:
        model_type: And `class_name`, as transformers names them.
        layer: Tensors of each layer: their names in the file and in transformers.
        switches: Tensors that all layers have or none, by the field that says so.
        permuted: Whether rows of queries and keys are interleaved for llama.cpp's rotary form.
        shifted_norms: Whether transformers adds one to the weights of norms.
    """

    model_type: str
    class_name: str
    layer: Mapping[str, str]
    switches: Mapping[str, Mapping[str, str]]
    permuted: bool = False
    shifted_norms: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        {**_LAYER, **_PRE_NORM},
        {"attention_bias": _ATTENTION_BIASES, "mlp_bias": _FEED_FORWARD_BIASES},
        permuted=True,
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", {**_LAYER, **_PRE_NORM, **_INPUT_BIASES}, {}),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_LAYER, **_PRE_NORM, **_HEAD_NORMS},
        {"attention_bias": _ATTENTION_BIASES},
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_LAYER, **_SANDWICH_NORMS, **_HEAD_NORMS},
        {"attention_bias": _ATTENTION_BIASES},
        shifted_norms=True,
    ),
}

# Keys under the architecture's name that are read here.
_FOLLOWED = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scale_linear"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
_FOLLOWED_BY_GEMMA = {
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    "final_logit_softcapping",
}


class DenseNetwork:
    """A network of one of `FAMILIES`; see `Network`."""

    idle: Set[str] = frozenset()

    def __init__(self, read: Metadata, rotary_factors: Floats | None) -> None:
        self._read = read
        self._family = FAMILIES[read.architecture]
        self.permuted = self._family.permuted
        self.shifted_norms = self._family.shifted_norms
        gemma = read.architecture == "gemma3"
        read.refuse_unfollowed(_FOLLOWED | _FOLLOWED_BY_GEMMA if gemma else _FOLLOWED)
        self.fields = self._fields(rotary_factors)

    def _fields(self, rotary_factors: Floats | None) -> dict[str, Any]:
        width = self._read.count("embedding_length")
        heads = self._read.count("attention.head_count")
        head_width = self._read.count("attention.key_length", width // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            self._read.expect_count(name, head_width, "the width of a head")
        layers, context = self._read.count("block_count"), self._read.count("context_length")
        fields = {
            "architectures": [self._family.class_name],
            "attention_bias": False,
            "dtype": "float32",
            "head_dim": head_width,
            "hidden_size": width,
            "intermediate_size": self._read.count("feed_forward_length"),
            "max_position_embeddings": context,
            "model_type": self._family.model_type,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": self._read.count("attention.head_count_kv", heads),
            "rms_norm_eps": self._read.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
            "tie_word_embeddings": HEAD not in self._read.shapes,
            "vocab_size": self._read.shape(EMBEDDING)[0],
        }
        if heads % fields["num_key_value_heads"]:
            self._read.refuse(
                f"{self._read.key('attention.head_count')} is {heads}, expected a multiple of "
                f"attention.head_count_kv, {fields['num_key_value_heads']}."
            )
        rotary = self._rotary(head_width, context, rotary_factors)
        fields |= {field: self._has_all(names) for field, names in self._family.switches.items()}
        if self._read.architecture == "gemma3":
            return fields | self._gemma(fields, rotary)
        return fields | {"hidden_act": "silu", "rope_parameters": rotary}

    def _gemma(self, fields: Mapping[str, Any], rotary: dict[str, Any]) -> dict[str, Any]:
        """What Gemma 3 has besides: windows, a second rotary base, its own scale of attention."""
        layers, head_width = fields["num_hidden_layers"], fields["head_dim"]
        window = self._read.number("attention.sliding_window", 0, 1 << 24, 0)
        scaled_by = head_width
        if layers == _GEMMA_27B_LAYERS:
            scaled_by = fields["hidden_size"] // fields["num_attention_heads"]
        local = self._read.number("rope.freq_base_swa", 1.0, 1e12, 10_000.0)
        return {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": self._read.number("final_logit_softcapping", 0.0, 1e6, 0.0)
            or None,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": self._layer_types(layers, window),
            "query_pre_attn_scalar": scaled_by,
            "rope_parameters": {
                "full_attention": rotary,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
            "sliding_window": window or fields["max_position_embeddings"],
            "use_bidirectional_attention": False,
        }

    def _layer_types(self, layers: int, window: int) -> list[str]:
        key = self._read.key("attention.sliding_window_pattern")
        found = self._read.get("attention.sliding_window_pattern", _GEMMA_PATTERN)
        if not window:
            sliding = [False] * layers
        elif isinstance(found, np.ndarray) and found.dtype == np.bool_ and len(found) == layers:
            sliding = found.tolist()
        elif type(found) is int and found >= 1:
            sliding = [bool((layer + 1) % found) for layer in range(layers)]
        else:
            self._read.refuse(
                f"{key} is {found!a:.60}, expected a number or {layers} truth values."
            )
        return ["sliding_attention" if each else "full_attention" for each in sliding]

    def _rotary(self, width: int, context: int, factors: Floats | None) -> dict[str, Any]:
        theta = self._read.number("rope.freq_base", 1.0, 1e12, 10_000.0)
        plain = {"rope_type": "default", "rope_theta": theta}
        kind = self._read.get("rope.scaling.type", "none")
        factor = self._read.number("rope.scaling.factor", 0.0, 1e6, 0.0)
        factor = factor or self._read.number("rope.scale_linear", 0.0, 1e6, 0.0)
        if kind == "none" and self._read.get("rope.scaling.type") is None and factor:
            kind = "linear"  # as llama.cpp takes a factor alone
        if self._read.number("rope.scaling.attn_factor", 0.0, 1e6, 1.0) != 1:
            self._read.refuse(f"{self._read.key('rope.scaling.attn_factor')} is not 1.")
        if kind in ("none", "linear") and factor in (0, 1):
            kind = "none"
        if factors is not None:
            if kind != "none" or self._read.architecture == "gemma3":
                self._read.refuse(f"has {ROTARY_FACTORS} besides a scaling of type {kind!a:.20}.")
            return plain | self._llama_rotary(theta, width, factors)
        if kind == "none":
            return plain
        if kind == "linear":
            return plain | {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and factor and self._read.architecture != "gemma3":
            return plain | self._yarn(factor, context)
        return self._read.refuse(
            f"{self._read.key('rope.scaling.type')} is {kind!a:.40} with a factor of {factor}, "
            "expected none, linear or (but in Gemma) yarn."
        )

    def _yarn(self, factor: float, context: int) -> dict[str, Any]:
        # -1 is llama.cpp's word for "as the type says", which is 1 here.
        if self._read.number("rope.scaling.yarn_ext_factor", -1.0, 1e6, 1.0) not in (1.0, -1.0):
            self._read.refuse(f"{self._read.key('rope.scaling.yarn_ext_factor')} is not 1.")
        scale = self._read.number("rope.scaling.yarn_attn_factor", 0.0, 1e6, 1.0)
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._read.count(
                "rope.scaling.original_context_length", context
            ),
            "attention_factor": scale * (1 + 0.1 * math.log(factor)),
            "beta_fast": self._read.number("rope.scaling.yarn_beta_fast", 0.0, 1e6, 32.0),
            "beta_slow": self._read.number("rope.scaling.yarn_beta_slow", 0.0, 1e6, 1.0),
        }

    def _llama_rotary(self, theta: float, width: int, factors: Floats) -> dict[str, Any]:
        """The fields that llama.cpp's converter made the factors [width / 2] of."""
        factor = float(str(factors.max(initial=0)))
        for context in _LLAMA_CONTEXTS:
            fields = {
                "rope_type": "llama3",
                "factor": factor,
                **_LLAMA_ROTARY,
                "original_max_position_embeddings": context,
            }
            expected = _llama_factors(theta, width, factor, context)
            if expected.shape == factors.shape and np.allclose(factors, expected, 1e-6, 0):
                return fields
        return self._read.refuse(f"{ROTARY_FACTORS} has factors that no form of Llama 3's gives.")

    def _has_all(self, names: Mapping[str, str]) -> bool:
        return all(f"blk.0.{name}" in self._read.shapes for name in names)

    def expected(self) -> Iterator[Parameter]:
        """Every parameter; see `Network`."""
        fields = self.fields
        width, vocabulary = fields["hidden_size"], fields["vocab_size"]
        yield Parameter("model.embed_tokens.weight", EMBEDDING, (vocabulary, width))
        yield Parameter("model.norm.weight", FINAL_NORM, (width,))
        if not fields["tie_word_embeddings"]:
            yield Parameter("lm_head.weight", HEAD, (vocabulary, width))
        names = dict(self._family.layer)
        for field, optional in self._family.switches.items():
            names |= optional if fields[field] else {}
        shapes = _layer_shapes(fields)
        for layer in range(fields["num_hidden_layers"]):
            for ours, theirs in names.items():
                yield Parameter(
                    f"model.layers.{layer}.{theirs}", f"blk.{layer}.{ours}", shapes[ours]
                )


def _layer_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a layer of any family may have."""
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    queries = fields["num_attention_heads"] * fields["head_dim"]
    keys = fields["num_key_value_heads"] * fields["head_dim"]
    sides = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": side for name, side in sides.items()}
    shapes |= {f"{name}.bias": side[:1] for name, side in sides.items()}
    shapes |= {f"{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"{name}.weight": (width,) for name in ("post_attention_norm", "post_ffw_norm")}
    return shapes | dict.fromkeys(_HEAD_NORMS, (fields["head_dim"],))


def _llama_factors(theta: float, width: int, factor: float, context: int) -> Doubles:
    """What divides each frequency [width / 2] by Llama 3's rule: 1 to `factor`."""
    low, high = _LLAMA_ROTARY["low_freq_factor"], _LLAMA_ROTARY["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    factors: Doubles = 1 / ((1 - smooth) / max(factor, 1.0) + smooth)
    return factors
