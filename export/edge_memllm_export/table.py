"""From rows to a table file: one pass over them, or two.

Codecs that share parameters between all tokens learn them in a first pass, which keeps statistics
of the rows and not the rows; the second pass writes. Knows rows by what gives them, a network or
another table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.artifact.manifest import FileSpec, TableSpec
from edge_memllm.codecs import get_codec
from edge_memllm.codecs.mixed import MixedCodec
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision import RowSource, Sizing, Target, plan_allocation
from edge_memllm.progress import Counted, Progress
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.writer import TableWriter
from edge_memllm.text.tokenizer_file import TOKENIZER_FILE
from edge_memllm_export.texts import TableText, table_text

if TYPE_CHECKING:
    from edge_memllm.modeling import MemoryLLMForCausalLM
    from edge_memllm_export.checkpoint import Checkpoint

_CHUNK_BYTES = 128 << 20
_MOST_TOKENS = 1024  # beyond this a chunk only costs memory


@dataclass(frozen=True)
class MixedFigures:
    """What mixed precision came to. Divergences are those of the table alone, in nats per token.

    They are taken on a sample of the table text.
    """

    target: str
    taken: str
    predicted_kl: float
    measured_kl: float
    compared_tokens: int
    text: str  # what frequencies and sensitivity come from


@dataclass(frozen=True)
class TableForm:
    """How a table is stored."""

    layout: RecordLayout
    vocab_size: int
    search: bool = False  # for the best scale of each group
    figures: MixedFigures | None = None  # where bits are mixed


def check_table_options(layout: RecordLayout, *, search: bool, text: str | None) -> None:
    """Refuse options that would change nothing with the codec of this layout."""
    codec = layout.codec
    if search and not codec.searches:
        raise ExportError(
            f"table search: codec {codec.id} has no scales to search for. Leave it out, or choose "
            "a codec of 4 bits or less."
        )
    if text is not None and not layout.parameters_bytes:
        raise ExportError(
            f"table text: codec {codec.id} learns nothing from a text. Leave it out, or choose "
            "codebook, lowrank or mixed precision."
        )


def learned(form: TableForm, source: RowSource, text: TableText | None = None) -> TableForm:
    """Show all rows to the codec, where it learns from them, and return the form with its levels.

    Each row counts as often as its token stands in the text, plus one; without a text all once.
    Raises ExportError for rows that no codec could learn from.
    """
    counts = None if text is None else np.bincount(text.tokens, minlength=form.vocab_size) + 1
    return _learned(form, source, counts)


def mixed(
    form: TableForm,
    target: Target,
    source: RowSource,
    runtime: Runtime,
    text: TableText,
    progress: Progress,
) -> TableForm:
    """Return the form with the mixed codec that suits a target best, its levels learned.

    Raises ExportError as `plan_allocation` and `learned` do.
    """
    sizing = Sizing(target, form.layout, form.vocab_size)
    plan = plan_allocation(
        source, runtime, text.tokens, sizing, search=form.search, progress=progress
    )
    layout = replace(form.layout, codec=MixedCodec.of(plan.allocation))
    found = _learned(replace(form, layout=layout), source, plan.shares * form.vocab_size)
    figures = MixedFigures(
        target=str(target),
        taken=sizing.described(sizing.taken(plan.allocation)),
        predicted_kl=plan.predicted_kl,
        measured_kl=plan.measured_kl(found.layout.codec, form.search),
        compared_tokens=sum(map(len, plan.subject.sample.windows)),
        text=text.name,
    )
    return replace(found, figures=figures)


def write_table(
    form: TableForm, source: RowSource, path: Path, identity: str
) -> tuple[TableSpec, FileSpec]:
    """Write a table whose codec has its parameters. Raises ExportError as `TableWriter` does."""
    order = form.layout.stored_order(form.vocab_size)
    with TableWriter(path, form.layout, form.vocab_size, identity, search=form.search) as writer:
        for embedding, rows in source.chunks("table", order):
            writer.append(embedding, rows)
        return writer.finish()


def _learned(form: TableForm, source: RowSource, weights: np.ndarray | None) -> TableForm:
    layout = form.layout
    if not layout.parameters_bytes:
        return form
    fit = layout.codec.fit(layout.layers, layout.width)
    order, seen = layout.stored_order(form.vocab_size), 0
    for _, rows in source.chunks("learning", order):
        tokens = order[seen : seen + len(rows)]
        _check_finite(rows, tokens)
        fit.add(rows, None if weights is None else weights[tokens].astype(np.float32))
        seen += len(rows)
    return replace(form, layout=layout.with_parameters(fit.parameters()))


def _check_finite(rows: np.ndarray, tokens: np.ndarray) -> None:
    """Raise ExportError for rows [N, L, D] that no codec could learn from."""
    finite = np.isfinite(rows).all(axis=2)
    if not finite.all():
        row, layer = np.argwhere(~finite)[0].tolist()
        raise ExportError(
            f"token {tokens[row]}, memory row of layer {layer}: not all values are finite. "
            "Check the checkpoint."
        )


def table_rows(
    network: MemoryLLMForCausalLM,
    *,
    chunk: int | None = None,
    tokens: np.ndarray | None = None,
    progress: Counted | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (embedding [N, D], rows [N, M, D]), both float32, of tokens in their order.

    ``tokens`` are their ids, None all of the vocabulary. ``chunk`` is N (the last one may be
    smaller); None chooses it so that rows take at most 128 MiB. Computes on the network's device.
    ``progress(done, total)`` is called after each chunk has been used.
    """
    import torch

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
    from edge_memllm_runtimes.torch_reference import TorchReference

    return mixed(
        form, target, rows, TorchReference(source.network()), _text(source, text), progress
    )


def _text(source: Checkpoint, text: str | None) -> TableText:
    file = source.path / TOKENIZER_FILE
    known = file.read_bytes() if file.is_file() else None
    return table_text(known, text, source.config.vocab_size, str(source.path))
