"""What every network of transformers' shape does as a judge: texts in, logits and gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edge_memllm.arrays import Floats
from edge_memllm_export.architectures.mapped_weights import HEAD, TIED_HEAD


class TextReference:
    """A network with `model` and `lm_head`; the part of a `Reference` that no family changes."""

    def __init__(self, network: Any, parts: Callable[[str], tuple[str, ...]]) -> None:
        """Take the frozen network, and the weights of a matrix of the graph."""
        self.network = network
        self._parts = parts

    def logits(self, ids: Sequence[int], chunk: int) -> Iterator[Floats]:
        """Logits [<= chunk, V] of a text: only the head, whose output is large, goes by chunks."""
        tokens = torch.tensor([ids], device=self.network.device)
        with torch.inference_mode():
            hidden = self.network.model(tokens, use_cache=False).last_hidden_state[0]
        for start in range(0, len(ids), chunk):
            with torch.inference_mode():
                logits = self.head(hidden[start : start + chunk])
            yield logits.float().cpu().numpy()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, V] of what the last norm gives [N, D]."""
        logits: torch.Tensor = self.network.lm_head(hidden)
        return logits

    def run(self, ids: torch.Tensor) -> None:
        """Compute a text [1, T], for what listens."""
        with torch.inference_mode():
            self.network.model(ids, use_cache=False)

    def modules(self, matrix: str) -> Sequence[nn.Module]:
        """The linear modules whose rows a matrix of the graph has."""
        return [self.network.get_submodule(_module(part)) for part in self._parts(matrix)]

    def predicted(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of texts, through which a gradient can pass."""
        logits: torch.Tensor = self.network(ids, use_cache=False).logits
        return logits


def _module(weight: str) -> str:
    """The linear module that a weight belongs to; a tied head's is the head."""
    return (HEAD if weight == TIED_HEAD else weight).removesuffix(".weight")
