"""What no single layer owns of the memory: a shared norm, a shared FFN-M, rows trained directly.

Each exists where the configuration asks for it; a plain MemoryLLM has none of them, for there
every layer has its own norm and FFN-M (``network.DecoderLayer``).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from edge_memllm.modeling.configuration import MemoryLLMConfig
from edge_memllm.modeling.feed_forward import SwiGLU

# Not for weight decay: a rare token's rows would shrink in all the steps that do without it, and
# a gain has one as its origin.
UNDECAYED = ("token_memory.rows.weight", "token_memory.gain")


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
