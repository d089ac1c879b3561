"""The rows of a network as a source for a table: what is learned from them, and by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edge_memllm.codecs import get_codec
from edge_memllm.mixed_precision import Target
from edge_memllm.modeling import MemoryLLMForCausalLM
from edge_memllm.records import RecordLayout
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.table_export import TableForm, learned, mixed
from edge_memllm_export.table_rows import table_rows
from edge_memllm_export.texts import TOKENIZER_FILE, TableText, table_text
from edge_memllm_runtimes.torch_reference import TorchReference

Progress = Callable[[str, int, int], None]


class NetworkRows:
    """A network that computes rows; see `edge_memllm.mixed_precision.RowSource`."""

    def __init__(
        self,
        network: MemoryLLMForCausalLM,
        layout: RecordLayout,
        chunk: int | None,
        progress: Progress,
    ) -> None:
        """Take the network, a table's layout of any codec, and how many tokens go at a time."""
        self.layout = RecordLayout(
            layout.layers, layout.width, get_codec("f32" if layout.layers else "none"), "float32"
        )
        self.context: int = network.config.max_position_embeddings
        self._network = network
        self._chunk = chunk
        self._progress = progress

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings [U, D] and rows [U, L, D] of tokens."""
        parts = list(table_rows(self._network, chunk=self._chunk, tokens=ids))
        embedding, rows = zip(*parts, strict=True)
        return np.concatenate(embedding), np.concatenate(rows)

    def chunks(self, stage: str, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield embeddings [N, D] and rows [N, L, D] of tokens, in this order."""
        return table_rows(
            self._network,
            chunk=self._chunk,
            tokens=order,
            progress=lambda done, total: self._progress(stage, done, total),
        )


def complete_form(
    source: Checkpoint,
    form: TableForm,
    rows: NetworkRows,
    target: Target | None,
    text: str | None,
    progress: Progress,
) -> TableForm:
    """The form with its codec, which a target has yet to find, and all that is to be learned.

    Raises ExportError for a text without the right tokenizer, a target that cannot be, and rows
    that are not finite.
    """
    if target is None:
        return learned(form, rows, None if text is None else _text(source, text))
    return mixed(
        form, target, rows, TorchReference(source.network()), _text(source, text), progress
    )


def _text(source: Checkpoint, text: str | None) -> TableText:
    file = source.path / TOKENIZER_FILE
    known = file.read_bytes() if file.is_file() else None
    return table_text(known, text, source.config.vocab_size, str(source.path))
