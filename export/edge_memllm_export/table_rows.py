"""The table's content, chunk by chunk: embeddings and memory rows computed by the network.

Memory stays at one chunk; the table as a whole never exists in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from edge_memllm.modeling import MemoryLLMForCausalLM

_CHUNK_BYTES = 128 << 20
_MOST_TOKENS = 1024  # beyond this a chunk only costs memory

Progress = Callable[[int, int], None]


def table_rows(
    network: MemoryLLMForCausalLM,
    *,
    chunk: int | None = None,
    tokens: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (embedding [N, D], rows [N, M, D]), both float32, of tokens in their order.

    ``tokens`` are their ids, None all of the vocabulary. ``chunk`` is N (the last one may be
    smaller); None chooses it so that rows take at most 128 MiB. Computes on the network's device.
    ``progress(done, total)`` is called after each chunk has been used.
    """
    config = network.config
    chunk = chunk or default_chunk(config.memory_layers, config.hidden_size)
    every = torch.arange(config.vocab_size) if tokens is None else torch.from_numpy(tokens)
    for start in range(0, len(every), chunk):
        ids = every[start : start + chunk].to(network.device)
        with torch.inference_mode():
            embedding = network.model.embed_tokens(ids)
            rows = network.model.memory_rows(ids)
        yield embedding.cpu().numpy(), rows.cpu().numpy()
        if progress is not None:
            progress(start + len(ids), len(every))


def default_chunk(layers: int, width: int) -> int:
    """Tokens per chunk whose rows, ``layers`` each, take at most 128 MiB as float32."""
    return max(1, min(_MOST_TOKENS, _CHUNK_BYTES // (max(layers, 1) * width * 4)))
