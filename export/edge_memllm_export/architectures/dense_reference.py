"""Dense networks of transformers as judges: run over texts, fed embeddings, taken apart by layers.

Their layers are named as Llama's. What is the family's own is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig

from edge_memllm.arrays import Floats, Ids
from edge_memllm.modeling import TokenRows
from edge_memllm.modeling.configuration import CACHE
from edge_memllm.modeling.rows import default_chunk
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows
from edge_memllm_export.architectures.architecture import StoredKV
from edge_memllm_export.architectures.mapped_weights import FloatEmbedding
from edge_memllm_export.architectures.text_reference import TextReference
from edge_memllm_export.graph.attention import AttentionShape
from edge_memllm_runtimes.torch_reference import TorchReference


class DenseReference(TextReference):
    """The network of transformers as a judge; see `Reference`."""

    def __init__(
        self,
        network: Any,
        shapes: Sequence[AttentionShape],
        parts: Callable[[str], tuple[str, ...]],
        *,
        heads_first: bool,
    ) -> None:
        """Take the frozen network, and of each layer its attention.

        `parts` are the weights of a matrix of the graph.
        `heads_first` says that keys are normed with heads before positions: [B, Hk, T, d].
        """
        super().__init__(network, parts)
        self._shapes = shapes
        self._heads_first = heads_first

    def rows(self, chunk: int | None = None) -> Rows:
        """Embeddings of tokens, and no rows."""
        return EmbeddingRows(self.network.model.embed_tokens, chunk)

    def fed_logits(self, ids: Sequence[int], embedding: Floats, rows: Floats) -> Floats:
        """Logits [T, V] out of embeddings [U, D] of the distinct ids, sorted."""
        index = np.unique(np.asarray(ids), return_inverse=True)[1]
        fed = torch.from_numpy(embedding[index][None]).to(self.network.device)
        with torch.inference_mode():
            found = self.network(inputs_embeds=fed, use_cache=False).logits[0]
        logits: Floats = found.float().cpu().numpy()
        return logits

    def runtime(self) -> Runtime:
        """The network behind the contract of runtimes."""
        return TorchReference(FedNetwork(self.network, self._shapes))

    def stored(self) -> Sequence[StoredKV]:
        """What each cache stores, in the order of the layers."""
        layers = zip(self.network.model.layers, self._shapes, strict=True)
        return [
            StoredKV(
                getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj),
                layer.self_attn.v_proj,
                shape.kv_heads,
                self._heads_first,
            )
            for layer, shape in layers
        ]


class EmbeddingRows:
    """What a table stores of a network without memory; see `edge_memllm.table.source.Rows`."""

    def __init__(self, embedding: FloatEmbedding, chunk: int | None) -> None:
        """Take how many tokens go at a time; None takes as many as have 128 MiB at most."""
        self._embedding = embedding
        self._chunk = chunk or default_chunk(1, embedding.weight.shape[1])

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [U, D] of tokens."""
        where = self._embedding.weight.device
        found: Floats = self._embedding(torch.from_numpy(ids).to(where)).cpu().numpy()
        return found

    def rows(self, ids: Ids) -> Floats:
        """Return no rows of no width, [U, 0, 0]."""
        return np.empty((len(ids), 0, 0), np.float32)

    def chunks(self, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and no rows [N, 0, 0] of tokens, in this order."""
        for start in range(0, len(order), self._chunk):
            ids = order[start : start + self._chunk]
            yield self.embeddings(ids), self.rows(ids)


class FedNetwork:
    """The network as a `RowNetwork`, which is fed embeddings alone."""

    dtype = torch.float32

    def __init__(self, network: Any, shapes: Sequence[AttentionShape]) -> None:
        self._network = network
        self.cache_shapes = [(shape.kv_heads, shape.head_dim) for shape in shapes]
        # Without windows, for whose caches nothing can be forgotten: what is seen is masked.
        self.config: Any = LlamaConfig(
            num_hidden_layers=len(shapes),
            max_position_embeddings=network.config.max_position_embeddings,
        )

    def eval(self) -> Self:
        """Return the network, which is ready to compute."""
        return self

    def fed(self, token_rows: TokenRows) -> dict[str, torch.Tensor]:
        """Return what the network takes in place of tokens."""
        return {"inputs_embeds": functional.embedding(token_rows.index, token_rows.embedding)}

    def __call__(
        self,
        *,
        token_rows: TokenRows,
        memory_gain: torch.Tensor | None,
        cache: DynamicCache,
        use_cache: bool,
        logits_to_keep: torch.Tensor,
    ) -> Any:
        """Return logits [B, K, V] of the positions to keep."""
        found = self._network(
            **self.fed(token_rows),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE: cache},
        )
        return SimpleNamespace(logits=found.logits)
