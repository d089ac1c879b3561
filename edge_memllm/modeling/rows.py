"""The rows of a network's tokens as numpy, a chunk at a time: what tables are made of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from edge_memllm.arrays import Floats, Ids
from edge_memllm.modeling.network import MemoryLLMForCausalLM

_CHUNK_BYTES = 128 << 20
_MOST_TOKENS = 1024  # beyond this a chunk only costs memory


class NetworkRows:
    """Computes rows on the network's device; see `edge_memllm.table.source.Rows`."""

    def __init__(self, network: MemoryLLMForCausalLM, chunk: int | None = None) -> None:
        """Take how many tokens go at a time; None takes as many as have 128 MiB of rows."""
        config = network.config
        self._network = network
        self._chunk = chunk or default_chunk(config.memory_layers, config.hidden_size)

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [U, D] of tokens."""
        with torch.inference_mode():
            return self._network.model.embed_tokens(self._on_device(ids)).cpu().numpy()

    def rows(self, ids: Ids) -> Floats:
        """Return the memory rows [U, M, D] of tokens, without gains."""
        return np.concatenate([rows for _, rows in self.chunks(ids)])

    def chunks(self, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        """Yield embeddings [N, D] and rows [N, M, D] of tokens, in this order."""
        model = self._network.model
        for start in range(0, len(order), self._chunk):
            ids = self._on_device(order[start : start + self._chunk])
            with torch.inference_mode():
                embedding, rows = model.embed_tokens(ids), model.memory_rows(ids)
            yield embedding.cpu().numpy(), rows.cpu().numpy()

    def _on_device(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(ids).to(self._network.device)


def default_chunk(layers: int, width: int) -> int:
    """Tokens per chunk whose rows, ``layers`` each, take at most 128 MiB as float32."""
    return max(1, min(_MOST_TOKENS, _CHUNK_BYTES // (max(layers, 1) * width * 4)))
