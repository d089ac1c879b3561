"""A dense model exported with its first layer's feed-forward network in the table.

No product: it is here so that what such a layer saves is measured on a real artifact. The table
holds one row for each token, which is the first layer's; the gains of all other layers are 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edge_memllm.arrays import Floats, Ids
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm_export import architectures, export_model
from edge_memllm_export.architectures.architecture import Source
from edge_memllm_export.architectures.dense import FEED_FORWARD
from edge_memllm_export.architectures.dense_reference import DenseReference, EmbeddingRows
from edge_memllm_export.architectures.llama import Llama
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.feed_forward import swiglu
from edge_memllm_export.graph.step import StepInputs, wanted_positions
from edge_memllm_export.graph.tokens import layer_memory

_KIND = "llama"
_KEPT = (
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "rss_anon_bytes",
    "table_bytes_read_per_token",
    "threads",
    "context",
    "new_tokens",
)


def export_pair(model: Path, rows: torch.Tensor, out: Path, **options: Any) -> tuple[Path, Path]:
    """Export a folder as it is and with rows [V, D] in its first layer, alike; both artifacts."""
    out.mkdir(parents=True, exist_ok=True)
    plain, table = out / "dense", out / "first-layer-table"
    for target, opened in ((plain, Llama), (table, partial(TableFirst, rows.numpy()))):
        if not target.exists():
            with _opening(opened):
                export_model(model, target, verify=False, **options)
    return plain, table


def compare(plain: Path, table: Path, rounds: int) -> dict[str, Any]:
    """Measure both in turns, each round; the ratio is the table's speed over the other's."""
    words = ["bench", "--compare", str(table), str(plain), "--json", "--repeats", str(rounds)]
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words, "--threads", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)
    cells = {cell["name"][0]: cell for cell in report["variants"]}
    return {
        "decode": report["comparisons"][0]["decode"],
        "prefill": report["comparisons"][0]["prefill"],
        "rounds": rounds,
        "processor": report["environment"]["processor"],
        "table": _sizes(table) | {name: cells["A"][name] for name in _KEPT},
        "dense": _sizes(plain) | {name: cells["B"][name] for name in _KEPT},
    }


def _sizes(artifact: Path) -> dict[str, int]:
    """Bytes that have to be in memory for each token, and bytes that may stay on storage."""
    sizes = {path.name: path.stat().st_size for path in artifact.iterdir() if path.is_file()}
    return {
        "graph_bytes": sum(size for name, size in sizes.items() if name.startswith("graph.onnx")),
        "table_bytes": sum(size for name, size in sizes.items() if name.startswith("table.")),
    }


@contextmanager
def _opening(opened: Any) -> Iterator[None]:
    kept = architectures.ARCHITECTURES[_KIND]
    architectures.ARCHITECTURES[_KIND] = opened
    try:
        yield
    finally:
        architectures.ARCHITECTURES[_KIND] = kept


class TableFirst(Llama):
    """A Llama whose first feed-forward network is rows [V, D]."""

    def __init__(self, rows: Floats, source: Source) -> None:
        super().__init__(source)
        self._rows = rows

    def memory(self) -> MemorySpec:
        """Return one row for each token, which the first layer alone reads."""
        gain = (1.0, *[0.0] * (len(self.shapes) - 1))
        return MemorySpec(1, int(self.config.hidden_size), "added", gain)

    def feed_forward_parameters(self) -> int:
        """Return how many weights all feed-forward networks but the first have."""
        layers = len(self.shapes)
        return super().feed_forward_parameters() // layers * (layers - 1)

    def judge(self, network: Any) -> DenseReference:
        """Return the network as a judge that has rows."""
        made = _WithRows(network, self.shapes, self.parts, heads_first=self.heads_first)
        made.first_rows = self._rows
        return made

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph: Llama's, but for the first layer's feed-forward network."""
        x, pending = step.tokens.embedding, None
        assert step.tokens.memory is not None  # there are rows
        for layer, attention in enumerate(self.attentions(graph, step)):
            path = f"/model/layers.{layer}"
            normed, x = self.add_norm(graph, f"{path}/input_layernorm", x, pending)
            last = layer + 1 == len(self.shapes)
            pending = self.attended(graph, attention, layer, normed, wanted=last)
            if last:
                (x,) = wanted_positions(graph, step, x=x)
            if layer == 0:
                memory = layer_memory(graph, step.tokens.memory, layer)
                x = graph.op(f"{path}/memory/Add", "Add", [x, memory])
                continue
            normed, x = self.add_norm(graph, f"{path}/post_attention_layernorm", x, pending)
            matrices = self.arrays(f"model.layers.{layer}.mlp", FEED_FORWARD)
            pending = swiglu(graph, f"{path}/mlp", normed, matrices)
        assert pending is not None  # there are layers
        return self.head(graph, x, pending)


class _WithRows(DenseReference):
    """A judge whose table has the rows."""

    first_rows: Floats

    def rows(self, chunk: int | None = None) -> EmbeddingRows:
        """Embeddings of tokens and their rows."""
        made = _Rows(self.network.model.embed_tokens, chunk)
        made.first_rows = self.first_rows
        return made


class _Rows(EmbeddingRows):
    first_rows: Floats

    def rows(self, ids: Ids) -> Floats:
        """Return the rows [U, 1, D] of tokens."""
        found: Floats = self.first_rows[np.asarray(ids)][:, None]
        return found
