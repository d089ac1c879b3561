"""Dense networks of transformers as judges: run over texts, fed embeddings, taken apart by layers.

Their layers are named as Llama's. What is the family's own is passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from edge_memllm.arrays import Floats, Ids
from edge_memllm.modeling import TokenRows
from edge_memllm.modeling.configuration import CACHE
from edge_memllm.modeling.rows import default_chunk
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows
from edge_memllm_export.architectures.architecture import Matrix, Stage, StoredKV
from edge_memllm_export.architectures.mapped_weights import FloatEmbedding
from edge_memllm_export.graph.blocks import AttentionShape, widen_heads
from edge_memllm_runtimes.torch_reference import TorchReference

# What the rotary embedding is asked for besides positions: the layers of a kind have one of theirs.
RotaryKind = tuple[str, ...]

_BATCH = 8  # windows in a layer at once


class DenseReference:
    """The network of transformers as a judge; see `Reference`."""

    def __init__(
        self,
        network: Any,
        shapes: Sequence[AttentionShape],
        kinds: Sequence[RotaryKind],
        *,
        heads_first: bool,
    ) -> None:
        """Take the frozen network, and of each layer its attention and which angles it turns by.

        `heads_first` says that keys are normed with heads before positions: [B, Hk, T, d].
        """
        self.network = network
        self._shapes = shapes
        self._kinds = kinds
        self._heads_first = heads_first

    def rows(self, chunk: int | None = None) -> Rows:
        """Embeddings of tokens, and no rows."""
        return EmbeddingRows(self.network.model.embed_tokens, chunk)

    def logits(self, ids: Sequence[int], chunk: int) -> Iterator[Floats]:
        """Logits [<= chunk, V] of a text: only the head, whose output is large, goes by chunks."""
        tokens = torch.tensor([ids], device=self.network.device)
        with torch.inference_mode():
            hidden = self.network.model(tokens, use_cache=False).last_hidden_state[0]
        for start in range(0, len(ids), chunk):
            with torch.inference_mode():
                logits = self.network.lm_head(hidden[start : start + chunk])
            yield logits.float().cpu().numpy()

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

    def run(self, ids: torch.Tensor) -> None:
        """Compute a text [1, T], for what listens."""
        with torch.inference_mode():
            self.network.model(ids, use_cache=False)

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

    @torch.no_grad()
    def stages(self, windows: torch.Tensor) -> Iterator[Stage]:
        """Yield every layer, and at last the head, before it is run over texts [N, T]."""
        model = self.network.model
        stream = [model.embed_tokens(part) for part in windows.split(_BATCH)]
        layers = zip(model.layers, self._shapes, self._kinds, strict=True)
        for number, (layer, shape, kind) in enumerate(layers):
            yield Stage(f"model.layers.{number}", _matrices(layer, shape))
            for place, x in enumerate(stream):
                stream[place] = layer(x, **self._fed(x, shape, kind))
        yield Stage("", {"lm_head": Matrix(self.network.lm_head)})
        for x in stream:
            self.network.lm_head(model.norm(x))

    def _fed(self, x: torch.Tensor, shape: AttentionShape, kind: RotaryKind) -> dict[str, Any]:
        """What the network gives a layer besides texts [N, T, D], from their start."""
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        make = create_causal_mask if shape.window is None else create_sliding_window_causal_mask
        mask = make(
            config=self.network.config,
            inputs_embeds=x,
            attention_mask=None,
            position_ids=positions,
            **{CACHE: None},
        )
        rotary = self.network.model.rotary_emb(x, positions, *kind)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}


def _matrices(layer: Any, shape: AttentionShape) -> dict[str, Matrix]:
    return {
        "self_attn.qkv_proj": Matrix(layer.self_attn.q_proj),
        "self_attn.o_proj": Matrix(layer.self_attn.o_proj, partial(widen_heads, shape=shape)),
        "mlp.gate_up_proj": Matrix(layer.mlp.gate_proj),
        "mlp.down_proj": Matrix(layer.mlp.down_proj),
    }


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
            num_hidden_layers=network.config.num_hidden_layers,
            max_position_embeddings=network.config.max_position_embeddings,
        )

    def eval(self) -> FedNetwork:
        """Return the network, which is ready to compute."""
        return self

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
        fed = functional.embedding(token_rows.index, token_rows.embedding)
        found = self._network(
            inputs_embeds=fed,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE: cache},
        )
        return SimpleNamespace(logits=found.logits)
