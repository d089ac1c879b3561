"""An artifact opened beside the network it was made from: logits of both for the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from edge_memllm.artifact import Artifact
from edge_memllm.feeding import Feeder
from edge_memllm.modeling import MemoryLLMForCausalLM, TokenRows
from edge_memllm.table import Table
from edge_memllm_runtimes import open_runtime


class JudgedArtifact:
    """The artifact's graph on the CPU, its table, and the network; use it in a with-statement."""

    def __init__(self, path: Path, network: MemoryLLMForCausalLM) -> None:
        self.network = network
        self.artifact = Artifact.open(path)
        try:
            self.table = Table.open(self.artifact, "pread")
            self._runtime = open_runtime(self.artifact, "cpu")
        except BaseException:
            self.artifact.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runtime.close()
        self.table.close()
        self.artifact.close()

    def graph_logits(self, ids: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """Logits float32 [<= chunk, V] of the graph, fed `chunk` tokens at a time."""
        with Feeder(self._runtime, self.table, 1, chunk) as feeder:
            for start in range(0, len(ids), chunk):
                yield np.array(feeder.score(0, ids[start : start + chunk]), np.float32)

    def network_logits(self, ids: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """Logits float32 [<= chunk, V] of the network, which computes the memory by itself.

        The layers see all ids at once; only the head, whose output is large, goes by chunks.
        """
        tokens = torch.tensor([ids], device=self.network.device)
        with torch.inference_mode():
            hidden = self.network.model(tokens, use_cache=False).last_hidden_state[0]
        for start in range(0, len(ids), chunk):
            with torch.inference_mode():
                logits = self.network.lm_head(hidden[start : start + chunk])
            yield logits.float().cpu().numpy()

    def live_rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [U, D] and memory rows [U, L, D] of `ids` [U], computed by the network."""
        tokens = torch.from_numpy(ids).to(self.network.device)
        model = self.network.model
        with torch.inference_mode():
            return model.embed_tokens(tokens).cpu().numpy(), model.memory_rows(tokens).cpu().numpy()

    def fed_logits(self, ids: Sequence[int], embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Logits [T, V] of the network fed with the rows of the distinct ids, in their order.

        `embedding` is [U, D] and `rows` [U, L, D] without gain.
        """
        index = np.unique(np.asarray(ids), return_inverse=True)[1].reshape(1, -1)
        arrays = (index, embedding, rows)
        fed = TokenRows(*(torch.from_numpy(array).to(self.network.device) for array in arrays))
        with torch.inference_mode():
            return self.network(token_rows=fed).logits[0].float().cpu().numpy()
