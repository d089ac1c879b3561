"""What is judged: an artifact's graph on the CPU and its table, beside the network it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ExportError
from edge_memllm.table.table import Table
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.graph_file import Node, read_graph
from edge_memllm_runtimes.options import RuntimeOptions

if TYPE_CHECKING:
    from edge_memllm_export.architectures.architecture import Reference


class JudgedArtifact:
    """The artifact's graph on the CPU, its table, and the judge; use it in a with-statement."""

    def __init__(self, path: Path, reference: Reference, *, own: bool = False) -> None:
        """Open it; `own` says that it is still being made, so that nobody else changes it."""
        self.reference = reference
        self.artifact = Artifact.open(path)
        try:
            self.table = Table.open(self.artifact, "pread")
            # In the graph's own float16: what overflows there does so on an accelerator.
            options = RuntimeOptions(own_files=own, own_dtype=True)
            self.runtime = open_runtime(self.artifact, "cpu", options)
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
        self.runtime.close()
        self.table.close()
        self.artifact.close()

    def graph_logits(self, ids: Sequence[int], chunk: int) -> Iterator[np.ndarray]:
        """Logits float32 [<= chunk, V] of the graph, fed `chunk` tokens at a time."""
        with Feeder(self.runtime, self.table, 1, chunk) as feeder:
            for start in range(0, len(ids), chunk):
                yield np.array(feeder.score(0, ids[start : start + chunk]), np.float32)

    def logits(self, ids: Sequence[int], chunk: int) -> np.ndarray:
        """The same of all positions, [T, V]."""
        return np.concatenate(list(self.graph_logits(ids, chunk)))

    @cached_property
    def weights(self) -> str:
        """The form that the graph is judged by: int2 where a mixed one has matrices of 2 bits."""
        graph = self.artifact.manifest.graph
        if graph.weights != "mixed":
            return graph.weights
        # A second part makes 6 bits of 4.
        few = (
            each.attributes["bits"] == 2 and ".part." not in each.inputs[1]
            for each in self._products
        )
        return "int2" if any(few) else "mixed"

    @property
    def largest_block(self) -> int:
        """The most weights of a matrix that share a scale; 0 where none do."""
        sizes = (each.attributes["block_size"] for each in self._products)
        return max((size for size in sizes if isinstance(size, int)), default=0)

    @cached_property
    def _products(self) -> list[Node]:
        """The products with matrices of few bits."""
        nodes = read_graph(self.artifact.read_bytes(self.artifact.manifest.graph.file)).nodes
        return [node for node in nodes if node.op_type == "MatMulNBits"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The artifact's own. Raises ArtifactError where there is none."""
        return Tokenizer.from_artifact(self.artifact)


def text_tokens(judged: JudgedArtifact, text: str, most: int) -> list[int]:
    """The first tokens of a text, at most `most`, by the artifact's own tokenizer.

    Raises ExportError when it gives tokens the model does not have.
    """
    return known_tokens(judged, judged.tokenizer.encode(text)[:most])


def known_tokens(judged: JudgedArtifact, ids: list[int]) -> list[int]:
    """The same ids, of a text. Raises ExportError for one that the model does not have."""
    vocabulary = judged.artifact.manifest.model.vocab_size
    if max(ids, default=0) >= vocabulary:
        raise ExportError(
            f"tokenizer.json gives token {max(ids)}, the model has {vocabulary}. "
            "The tokenizer is another model's; put the right one into the checkpoint."
        )
    return ids
