"""A GGUF file's metadata as the configuration of a transformers model, and its tensors' names.

What a family's network in llama.cpp computes is said in transformers' words, so that both compute
the same: what that cannot be done with is refused by the key or tensor that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, Protocol

from edge_memllm.arrays import Floats
from edge_memllm_export.sources import gguf_dense
from edge_memllm_export.sources.gguf_dense import DenseNetwork
from edge_memllm_export.sources.gguf_gemma3n import Gemma3nNetwork
from edge_memllm_export.sources.gguf_gemma4 import Gemma4Network
from edge_memllm_export.sources.gguf_metadata import ROTARY_FACTORS, Metadata, Parameter


class Network(Protocol):
    """What the files of one architecture hold."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The configuration, in transformers' names."""

    @property
    def permuted(self) -> bool:
        """Whether rows of queries and keys are interleaved for llama.cpp's rotary form."""

    @property
    def shifted_norms(self) -> bool:
        """Whether the file has one more in the weights of norms than transformers."""

    @property
    def idle(self) -> Set[str]:
        """Tensors that may be there and are never computed with."""

    def expected(self) -> Iterator[Parameter]:
        """Every parameter, in transformers' and in the file's names."""


_NETWORKS: Mapping[str, Callable[[Metadata, Floats | None], Network]] = {
    **dict.fromkeys(gguf_dense.FAMILIES, DenseNetwork),
    "gemma3n": Gemma3nNetwork,
    "gemma4": Gemma4Network,
}


class GGUFConfig:
    """The configuration, and where each of transformers' parameters lies in the file."""

    def __init__(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        rotary_factors: Floats | None,
        where: str,
    ) -> None:
        """Take the metadata, the shape of every tensor and what `ROTARY_FACTORS` holds, if any.

        Raises:
            ExportError: The network is none that is known, incomplete, or cannot be said exactly.
        """
        self._read = Metadata(metadata, shapes, where, _NETWORKS)
        self.network = _NETWORKS[self._read.architecture](self._read, rotary_factors)
        self.fields = self.network.fields
        self.tensors = self._tensors()

    def _tensors(self) -> dict[str, Parameter]:
        """Where each parameter lies, by its name; complete, in shape, and nothing left over."""
        found = {each.name: each for each in self.network.expected()}
        for each in found.values():
            shape = self._read.shape(each.tensor)
            if shape != each.shape:
                self._read.refuse(
                    f"tensor {each.tensor} has the shape {list(shape)}, expected "
                    f"{list(each.shape)}.",
                    "The file is damaged, or its metadata is another model's.",
                )
        known = {ROTARY_FACTORS, *self.network.idle, *(each.tensor for each in found.values())}
        if left := sorted(set(self._read.shapes) - known):
            self._read.refuse(
                f"has the tensor {left[0]!a:.80}, which no {self._read.architecture} network here "
                "has."
            )
        return found
