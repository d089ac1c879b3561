"""Gemma 3n in GGUF files: four streams, a low-rank path beside attention, rows of tokens.

llama.cpp reads no number of streams, layers that share keys or sparse ones: it knows those of E2B
and E4B. Here the file's metadata says them, as its converter writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_memllm.arrays import Floats
from edge_memllm_export.sources.gguf_gemma4 import (
    FOLLOWED,
    FULL,
    SLIDING,
    SOFTCAP,
    PerLayerNetwork,
)
from edge_memllm_export.sources.gguf_metadata import ROTARY_FACTORS, Metadata, Parameter

_SPARSITY = "activation_sparsity_scale"
_OF_GEMMA_3N = {"altup.active_idx", "altup.num_inputs", _SPARSITY}
_DIGITS = 7  # of a share of values, whose quantile the file has in float32


class Gemma3nNetwork(PerLayerNetwork):
    """A network of Gemma 3n; see `Network`."""

    def __init__(self, read: Metadata, rotary_factors: Floats | None) -> None:
        if rotary_factors is not None:
            read.refuse(f"has {ROTARY_FACTORS}, which no Gemma 3n has.")
        read.refuse_unfollowed(FOLLOWED | _OF_GEMMA_3N)
        super().__init__(read)
        self._head = read.count("attention.key_length")
        for name in ("attention.value_length", "rope.dimension_count"):
            read.expect_count(name, self._head, "the width of a head")
        self._inner = read.counts("feed_forward_length", self._layers)
        self.fields = self._fields()

    def expected(self) -> Iterator[Parameter]:
        """Every parameter; matrices between streams are stacked in the file."""
        yield from super().expected()
        width, others = self.fields["hidden_size"], self.fields["altup_num_inputs"] - 1
        for theirs, ours in (
            ("altup_projections", "altup_proj"),
            ("altup_unembed_projections", "altup_unembd_proj"),
        ):
            for part in range(others):
                name, shape = f"model.{theirs}.{part}.weight", (others, width, width)
                yield Parameter(name, f"{ours}.weight", shape, part)

    def layer(self, layer: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """The parameters of a layer."""
        yield from super().layer(layer)
        fields = self.fields
        width, streams = fields["hidden_size"], fields["altup_num_inputs"]
        rank = fields["laurel_rank"]
        yield "altup.correct_output_scale", "altup_correct_scale", (width,)
        yield "altup.correction_coefs.weight", "altup_correct_coef", (streams, streams)
        yield "altup.prediction_coefs.weight", "altup_predict_coef", (streams**2, streams)
        yield "altup.modality_router.weight", "altup_router", (streams, width)
        yield "altup.router_norm.weight", "altup_router_norm", (width,)
        yield "laurel.linear_left.weight", "laurel_l", (rank, width)
        yield "laurel.linear_right.weight", "laurel_r", (width, rank)
        yield "laurel.post_laurel_norm.weight", "laurel_post_norm", (width,)

    def heads(self, layer: int) -> tuple[int, int]:
        """The width of a head, and how many there are of keys and values."""
        return self._head, self.fields["num_key_value_heads"]

    def inner(self, layer: int) -> int:
        """The width of the feed-forward network of a layer."""
        return self._inner[layer]

    def _fields(self) -> dict[str, Any]:
        read = self._read
        streams = read.count("altup.num_inputs")
        fields = self.common_fields() | {
            "activation_sparsity_pattern": self._sparsity(),
            "altup_active_idx": read.number("altup.active_idx", 0, streams - 1),
            "altup_correct_scale": True,
            "altup_num_inputs": streams,
            "architectures": ["Gemma3nForCausalLM"],
            "final_logit_softcapping": read.number("final_logit_softcapping", 0.0, 1e6, SOFTCAP),
            "head_dim": self._head,
            "intermediate_size": self._inner,
            "laurel_rank": read.shape("blk.0.laurel_l.weight")[0],
            "model_type": "gemma3n_text",
            "num_key_value_heads": read.count("attention.head_count_kv"),
            "rope_parameters": {
                FULL: {
                    "rope_type": "default",
                    "rope_theta": read.number("rope.freq_base", 1.0, 1e12),
                },
                SLIDING: self.local_rotary(),
            },
        }
        self.check_heads(fields["num_attention_heads"], fields["num_key_value_heads"])
        return fields

    def _sparsity(self) -> list[float]:
        """The share of values that are cut in each layer, out of its quantile of the normal law."""
        found = self._read.get(_SPARSITY)
        if (
            not isinstance(found, np.ndarray)
            or found.shape != (self._layers,)
            or not (found < math.inf).all()
        ):
            self._read.refuse(
                f"{self._read.key(_SPARSITY)} is {found!a:.60}, expected {self._layers} numbers."
            )
        return [round((1 + math.erf(each / math.sqrt(2))) / 2, _DIGITS) for each in found.tolist()]
