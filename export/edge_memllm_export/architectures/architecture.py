"""The contract of a family: everything about a model that only its architecture knows.

A family is one file beside this one. The exporter asks it what the manifest says, for the graph,
and for the network that judges both; which family it is, it never asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edge_memllm.arrays import Floats
from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.modeling.stored_weights import NameOf
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.table.source import Rows
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.step import StepInputs
from edge_memllm_export.sources.gguf_grids import Grid

Weights = Mapping[str, torch.Tensor]
Side = Literal["rows", "columns"]


class Source(Protocol):
    """Configuration, weights by name and what is known of text, of a folder or one file."""

    @property
    def path(self) -> Path:
        """The folder or the file."""

    @property
    def where(self) -> Path:
        """What errors point to: where the configuration is from."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The configuration, as it was given."""

    def weights(
        self,
        expected: Weights,
        *,
        tied: bool,
        described: str,
        named: NameOf = str,
        apart: str | None = None,
    ) -> Weights:
        """The weights, which are those that `expected` names, in the dtype they are stored in.

        `tied` says that the head is the embedding, `named` what the network calls a stored weight.
        The weight `apart` may come without values, on the meta device: see `rows`.
        Raises UnusableCheckpointError for others than the network that is `described` has.
        """

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a weight that came without values, from `start` to before `stop`."""

    @property
    def kinds(self) -> Mapping[str, str]:
        """The type that each matrix of a quantised file is stored in, by name; else nothing."""

    def grid(self, name: str, start: int = 0, stop: int | None = None) -> Grid | None:
        """Rows of a matrix as they are stored, from `start` to before `stop`; None if no grid."""

    def text_file(self, name: str) -> bytes | None:
        """The content of one of `edge_memllm.text.TEXT_FILES`; None where there is none.

        Raises UnusableCheckpointError or OSError for one that cannot be read.
        """


class Folding(NamedTuple):
    """What is divided by the factors that the columns of a matrix are multiplied with."""

    divided: tuple[str, ...]  # weights [K] or, row by row, [K, n]
    shared: int = 1  # heads in turn that read the same rows, so have the same factors
    width: int = 1  # columns of a head


class StoredKV(NamedTuple):
    """Modules of the reference whose outputs are what one cache stores.

    Keys are taken before the rotary embedding: [B, T, Hk * d] or [B, T, Hk, d].
    """

    keys: nn.Module
    values: nn.Module
    kv_heads: int
    heads_first: bool = False  # keys are [B, Hk, T, d]


class Reference(Protocol):
    """The network in torch: the judge of table and graph, and what calibration listens to."""

    @property
    def network(self) -> Any:
        """The network itself, frozen."""

    def rows(self, chunk: int | None = None) -> Rows:
        """Embeddings and memory rows of tokens, without gain, computed a chunk at a time."""

    def logits(self, ids: Sequence[int], chunk: int) -> Iterator[Floats]:
        """Logits [<= chunk, V] of a text; the network computes its memory by itself."""

    def fed_logits(self, ids: Sequence[int], embedding: Floats, rows: Floats) -> Floats:
        """Logits [T, V] out of embeddings [U, D] and rows [U, L, W] of the distinct ids, sorted."""

    def runtime(self) -> Runtime:
        """The network behind the contract of runtimes."""

    def run(self, ids: torch.Tensor) -> None:
        """Compute a text [1, T], for what listens."""

    def stored(self) -> Sequence[StoredKV]:
        """What each cache stores, in the order of the manifest's."""

    def modules(self, matrix: str) -> Sequence[nn.Module]:
        """The linear modules whose rows are, in turn, those of a matrix of the graph."""

    def predicted(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of texts [B, T], through which a gradient can pass."""


class Architecture(Protocol):
    """One model of a family."""

    @property
    def spec(self) -> ModelSpec:
        """What a manifest says of it; its identity and the tokens that end a text are left open."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The configuration, complete."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What changes a logit besides the weights: part of the model's identity."""

    @property
    def weights(self) -> Weights:
        """All weights by name; a tied head is not among them."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names that the graph gives its matrices, as they lie in it."""

    @property
    def delicate_kinds(self) -> tuple[str, ...]:
        """Those of them that are stored in 8 bits where all are to have fewer."""

    @property
    def rotary_values(self) -> int:
        """Numbers that the tables of angles hold for each position."""

    def limited(self, context: int) -> Architecture:
        """The same network for texts of at most so many positions."""

    @property
    def notes(self) -> Sequence[str]:
        """What is left out of the model, and the like, in sentences."""

    def parts(self, matrix: str) -> tuple[str, ...]:
        """The weights whose rows are, in turn, those of a matrix of the graph, by their names.

        In the graph rows and columns of zeros may have come in.
        """

    def arranged(self, matrix: str, values: np.ndarray, side: Side) -> np.ndarray:
        """Values of a matrix's rows or columns [n, ...] with zeros where the graph's is wider."""

    def folding(self, matrix: str) -> Folding | None:
        """Where factors of a matrix's columns can cancel; None where they can not."""

    def folded(self, factors: Mapping[str, Floats]) -> Architecture:
        """The same network with columns of matrices of the graph [K] times these factors."""

    def makes_rows(self, weight: str) -> bool:
        """Whether a weight does nothing but make memory rows."""

    @property
    def row_table(self) -> str | None:
        """The weight [V, L * W] that is the memory rows, times one number; None if computed."""

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        """Record the graph; returns its logits [B, K, V]."""

    def reference(
        self, device: str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> Reference:
        """The network over the weights where they are; its matrices compute in `compute_dtype`."""
