"""The one definition of the network: attention on the residual stream, memory on the token.

``x_{l+1} = x_l + Attn_l(norm(x_l)) [+ FFN-C_l(norm(.))] + gain_l * M_l[t]`` with
``M_l[t] = FFN-M_l(norm_l(E[t]))`` and ``x_0 = E[t]`` (paper, eq. 2.4-2.6; ``token_memory`` has
the variants). The memory may be computed here or fed as ready rows: training and export do the
first, judging a table the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from edge_memllm.modeling.configuration import CACHE, MemoryLLMConfig, one_cache

# Not for weight decay: a rare token's rows would shrink in all the steps that do without it, and
# a gain has one as its origin.
UNDECAYED = ("token_memory.rows.weight", "token_memory.gain")


def build_attention(config: MemoryLLMConfig, layer: int) -> LlamaAttention | Qwen3Attention:
    """Attention with biases of query, key and value where the configuration has them.

    The output projection never has one, which Llama's own ``attention_bias`` gives it.
    """
    kind = Qwen3Attention if config.qk_norm else LlamaAttention
    attention = kind(config, layer)
    if config.attention_bias:
        output = attention.o_proj
        attention.o_proj = nn.Linear(output.in_features, output.out_features, bias=False)
    return attention


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases (paper, eq. 2.3)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class TrainedRows(nn.Embedding):
    """Memory rows that are parameters, one line [M * D] per token.

    They start at zero, so that a token which training never meets adds nothing, and a network
    that has an FFN-M as well starts as if it had no others.
    """


class TokenMemory(nn.Module):
    """From tokens to what the layers make their memory of.

    ``gain`` is learned, one number per layer, where all layers share one memory: it is all that
    tells them apart.
    """

    def __init__(self, config: MemoryLLMConfig) -> None:
        super().__init__()
        self.width = config.hidden_size
        self.norm: nn.Module | None = None
        self.network: nn.Module | None = None
        self.rows: nn.Module | None = None
        self.gain: nn.Parameter | None = None
        shared = config.memory_sharing == "all_layers"
        if config.has_memory_network and (shared or config.memory_norm == "shared"):
            self.norm = LlamaRMSNorm(self.width, eps=config.rms_norm_eps)
        if config.has_memory_network and shared:
            self.network = SwiGLU(self.width, config.memory_intermediate_size)
        if config.has_trained_rows:
            self.rows = TrainedRows(config.vocab_size, config.memory_layers * self.width)
        if shared:
            self.gain = nn.Parameter(torch.ones(config.num_hidden_layers))

    def forward(
        self, ids: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What each layer's own FFN-M reads [U, D], and the rows [U, M, D] to add to its output.

        ``ids`` [U] and their ``embedding`` [U, D]. M is 1 where all layers share one memory.
        """
        source = embedding if self.norm is None else self.norm(embedding)
        rows = None if self.rows is None else self.rows(ids).unflatten(-1, (-1, self.width))
        if self.network is not None:
            computed = self.network(source).unsqueeze(1)
            rows = computed if rows is None else rows + computed
        return source, rows


def rows_of_layer(rows: torch.Tensor | None, layer: int) -> torch.Tensor | None:
    """The rows [U, D] of one layer out of [U, M, D]: its own, or those that all layers share."""
    if rows is None or not rows.shape[1]:
        return None
    return rows[:, layer if rows.shape[1] > 1 else 0]


@dataclass(frozen=True)
class TokenRows:
    """Everything token-dependent, ready made: what a table holds for the tokens of one step.

    ``index`` LongTensor [B, T] points into ``embedding`` [U, D] and ``memory`` [U, M, D] with
    ``config.memory_layers`` rows.
    """

    index: torch.Tensor
    embedding: torch.Tensor
    memory: torch.Tensor


class DecoderLayer(nn.Module):
    """One block: attention, FFN-C where beta > 0, and the memory added to the stream."""

    def __init__(self, config: MemoryLLMConfig, layer: int) -> None:
        super().__init__()
        self.mlp: nn.Module | None = None
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_attention(config, layer)
        if config.has_compute:
            self.post_attention_layernorm = LlamaRMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.memory: nn.Module | None = None
        if config.has_memory_network and config.memory_sharing == "per_layer":
            shared = config.memory_norm == "shared"
            norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.memory_layernorm = nn.Identity() if shared else norm
            self.memory = SwiGLU(config.hidden_size, config.memory_intermediate_size)

    def memory_rows(
        self, source: torch.Tensor | None, rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        """This layer's memory rows [U, D] without gain; None for the dense baseline.

        Its FFN-M of ``source`` [U, D], unless that is None, and ready ``rows`` [U, D].
        """
        if self.memory is None or source is None:
            return rows
        computed = self.memory(self.memory_layernorm(source))
        return computed if rows is None else computed + rows

    def forward(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        source: torch.Tensor | None,
        rows: torch.Tensor | None,
        gain: torch.Tensor | float,
        **attention: Any,
    ) -> torch.Tensor:
        """``x`` [B, T, D]; ``index`` [B, T] points into the ``memory_rows`` of the others."""
        attended = x + self.self_attn(self.input_layernorm(x), **attention)[0]
        out = attended
        if self.mlp is not None:
            out = out + self.mlp(self.post_attention_layernorm(attended))
        memory = self.memory_rows(source, rows)
        if memory is None:
            return out
        # In the stream's dtype: a frequent token's gradient is summed over many positions.
        return out + functional.embedding(index, (memory * gain).to(x.dtype))


class MemoryLLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, shared by the two public classes."""

    config: MemoryLLMConfig
    config_class = MemoryLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TrainedRows):
            init.zeros_(module.weight)
        elif isinstance(module, TokenMemory) and module.gain is not None:
            init.ones_(module.gain)
        else:
            super()._init_weights(module)


class MemoryLLMModel(MemoryLLMPreTrainedModel):
    """Token ids (or ready token rows) to final hidden states.

    ``distinct_tokens``: make the memory once per distinct token of the batch and gather, which
    gives the same loss and gradients for less work. False makes it at every position.
    """

    def __init__(self, config: MemoryLLMConfig) -> None:
        super().__init__(config)
        self.distinct_tokens = True
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.token_memory = TokenMemory(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def memory_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Live memory rows without gain: LongTensor [N] -> float32 [N, M, D] (eq. 2.9).

        M is ``config.memory_layers``; [N, 0, 0] for the dense baseline.
        """
        embedding = self.embed_tokens(token_ids)
        source, rows = self.token_memory(token_ids, embedding)
        layers = self.layers[: self.config.memory_layers]
        memory = [
            layer.memory_rows(source, rows_of_layer(rows, n)) for n, layer in enumerate(layers)
        ]
        if not memory:
            return embedding.new_empty(len(token_ids), 0, 0).float()
        return torch.stack([part.float() for part in memory], dim=1)

    def memory_gain(self, layer: int) -> torch.Tensor | float:
        """What the memory of a layer is multiplied by: as configured, times what was learned."""
        given, learned = self.config.memory_gain, self.token_memory.gain
        gain = 1.0 if given is None else given[layer]
        return gain if learned is None else gain * learned[layer]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        token_rows: TokenRows | None = None,
        memory_gain: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """``input_ids`` [B, T] or ``token_rows``, never both: hidden states [B, T, D].

        ``memory_gain`` [L] replaces the network's own gains for this call. ``past_key_values`` is
        the older name of ``cache``.
        """
        if (input_ids is None) == (token_rows is None):
            raise ValueError("Give either input_ids or token_rows.")
        if token_rows is None:
            distinct, index = self._distinct(input_ids)
            embedding = self.embed_tokens(distinct)
            source, rows = self.token_memory(distinct, embedding)
        else:
            index, embedding = token_rows.index, token_rows.embedding
            source, rows = None, token_rows.memory
        x = functional.embedding(index, embedding)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = past + torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        attention = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            ),
            "position_embeddings": self.rotary_emb(x, position_ids=position_ids),
            CACHE: cache,
        }
        for number, layer in enumerate(self.layers):
            gain = self.memory_gain(number) if memory_gain is None else memory_gain[number]
            made_of = source, rows_of_layer(rows, number), gain
            x = layer(x, index, *made_of, **attention, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})

    def _distinct(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [U] and the index [B, T] into them."""
        if self.distinct_tokens:
            return torch.unique(input_ids, return_inverse=True)
        every = input_ids.reshape(-1)
        return every, torch.arange(every.numel(), device=every.device).view_as(input_ids)


class MemoryLLMForCausalLM(MemoryLLMPreTrainedModel, GenerationMixin):
    """The network with its language-model head; Hugging Face ``generate`` works on it."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MemoryLLMConfig) -> None:
        super().__init__(config)
        self.model = MemoryLLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """Heads and width of the keys, or values, that each layer stores."""
        config = self.config
        return [(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_rows: TokenRows | None = None,
        return_dict: bool = True,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, K, V] of the last ``logits_to_keep`` positions (0: all; a tensor: those)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            use_cache=use_cache,
            token_rows=token_rows,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)}
        )
        return result if return_dict else result.to_tuple()
