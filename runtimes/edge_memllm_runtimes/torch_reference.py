"""The judge: the torch network behind the runtime's contract, fed with the table's own rows.

Rows are decoded on the host by the codec, and each sequence is computed by itself, so nothing
here shares a shortcut with what it judges. Slow, and needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.modeling import TokenRows
from edge_memllm.runtime_protocol import KVCache, KVState, KVStateLayout
from edge_memllm_runtimes.kv_cache import GrowingCache, Mark, check_step, own_cache

_PARTS = ("key", "value")


class RowNetwork(Protocol):
    """A network of torch that can be fed ready rows in place of tokens."""

    config: Any  # of transformers
    dtype: torch.dtype

    @property
    def cache_shapes(self) -> Sequence[tuple[int, int]]:
        """Heads and width of the keys and values that are stored, in the order of their layers."""

    def eval(self) -> Self:
        """Return the network, ready to compute."""

    def __call__(
        self,
        *,
        token_rows: TokenRows,
        memory_gain: torch.Tensor | None,
        cache: DynamicCache,
        use_cache: bool,
        logits_to_keep: torch.Tensor,
    ) -> Any:
        """Return an output whose `logits` [B, K, V] are those of the positions to keep."""


class TorchCache(GrowingCache):
    """One cache of transformers per sequence."""

    def __init__(self, network: RowNetwork, batch: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(batch, network.config.max_position_embeddings)
        self._network = network
        self._dtype = dtype or network.dtype  # of keys and values
        self.sequences = [DynamicCache(config=network.config) for _ in range(batch)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(
            tensor.nbytes
            for sequence in self.sequences
            for layer in sequence.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        )

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of one sequence from `length` on."""
        surplus = int(self.lengths[sequence]) - length
        super().truncate(sequence, length)
        if surplus:
            self.sequences[sequence].crop(-surplus)  # 0 means different things to versions

    def _grow(self, capacity: int) -> None:
        """The caches of transformers grow by themselves."""

    def _copy(self, sequence: int, source: int, length: int, mark: Mark | None) -> None:
        copied = deepcopy(self.sequences[source])
        surplus = int(self.lengths[source]) - length
        if surplus:
            copied.crop(-surplus)
        self.sequences[sequence] = copied

    def _swap(self, first: int, second: int) -> None:
        own = self.sequences
        own[first], own[second] = own[second], own[first]

    def state_layout(self, length: int) -> KVStateLayout:
        """Return [Hk, T, d] for every layer's keys and values; numpy has no bfloat16."""
        kind = torch.empty(0, dtype=self._dtype).numpy().dtype
        return {
            f"{layer}.{part}": (kind, (heads, length, width))
            for layer, (heads, width) in enumerate(self._network.cache_shapes)
            for part in _PARTS
        }

    def _state(self, sequence: int, length: int) -> KVState:
        if not length:
            return {
                name: np.empty(shape, kind) for name, (kind, shape) in self.state_layout(0).items()
            }
        layers = enumerate(self.sequences[sequence].layers)
        return {
            f"{number}.{part}": tensor[0].numpy()
            for number, layer in layers
            for part, tensor in zip(_PARTS, (layer.keys, layer.values), strict=True)
        }

    def _load_state(self, sequence: int, length: int, state: KVState) -> None:
        for layer in range(len(self._network.cache_shapes)):
            keys, values = (torch.tensor(state[f"{layer}.{part}"])[None] for part in _PARTS)
            self.sequences[sequence].update(keys, values, layer)

    def _free(self) -> None:
        self.sequences.clear()


class TorchReference:
    """A network as a runtime; see `edge_memllm.runtime_protocol.Runtime`."""

    device = "cpu"

    def __init__(self, network: RowNetwork, compute_dtype: torch.dtype | None = None) -> None:
        """Take a network on the CPU, in any float dtype.

        `compute_dtype` is that of its activations, None for the dtype of its weights.
        """
        self.name = f"torch {torch.__version__}"
        self._network = network.eval()
        self._dtype = compute_dtype or network.dtype

    def new_cache(self, batch: int) -> TorchCache:
        """Return an empty cache."""
        return TorchCache(self._network, batch, self._dtype)

    def step(
        self,
        buffer: RecordBuffer,
        distinct: int,
        token_index: NDArray[np.int64],
        cache: KVCache,
        logits_index: NDArray[np.int64] | None,
        *,
        sequence: int | range | None = None,
        memory_gain: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Append tokens and return logits; see `edge_memllm.runtime_protocol.Runtime`."""
        own = own_cache(cache, TorchCache)
        batch, tokens = token_index.shape
        if logits_index is None:
            logits_index = np.zeros((batch, 0), np.int64)
        check_step(token_index, distinct, own, logits_index, sequence)
        gain = None if memory_gain is None else torch.from_numpy(memory_gain)
        active = own.active(sequence)
        own.ensure(int(own.lengths[active].max()) + tokens)
        logits = [
            self._logits(buffer, distinct, index, past, wanted, gain)
            for index, past, wanted in zip(
                token_index, own.sequences[active], logits_index, strict=True
            )
        ]
        own.lengths[active] += tokens
        return np.stack(logits)

    def close(self) -> None:
        """Nothing to free: the network belongs to the caller."""

    def _logits(
        self,
        buffer: RecordBuffer,
        distinct: int,
        index: NDArray[np.int64],
        past: DynamicCache,
        wanted: NDArray[np.int64],
        gain: torch.Tensor | None,
    ) -> NDArray[np.float32]:
        """Compute one sequence: index [T] into the records, logits [K, V]."""
        rows = TokenRows(
            torch.from_numpy(index).unsqueeze(0),
            torch.from_numpy(buffer.embedding(distinct).astype(np.float32)).to(self._dtype),
            torch.from_numpy(buffer.rows(distinct)),
        )
        with torch.inference_mode():
            output = self._network(
                token_rows=rows,
                memory_gain=gain,
                cache=past,
                use_cache=True,
                logits_to_keep=torch.from_numpy(wanted),
            )
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits
