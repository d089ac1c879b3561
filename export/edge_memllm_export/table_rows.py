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
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (embedding [N, D], rows [N, L, D]), both float32, for all token ids in order.

    ``chunk`` is N (the last one may be smaller); None chooses it so that rows take at most
    128 MiB. Computes on the network's device. ``progress(done, total)`` is called after each chunk
    has been used.
    """
    config = network.config
    chunk = chunk or default_chunk(config.num_hidden_layers, config.hidden_size)
    for start in range(0, config.vocab_size, chunk):
        stop = min(start + chunk, config.vocab_size)
        ids = torch.arange(start, stop, device=network.device)
        with torch.inference_mode():
            embedding = network.model.embed_tokens(ids)
            rows = network.model.memory_rows(ids)
        yield embedding.cpu().numpy(), rows.cpu().numpy()
        if progress is not None:
            progress(stop, config.vocab_size)


def default_chunk(layers: int, width: int) -> int:
    """Tokens per chunk whose rows take at most 128 MiB as float32."""
    return max(1, min(_MOST_TOKENS, _CHUNK_BYTES // (layers * width * 4)))
