"""A student's first weights: the dense network's own where there are such, else fitted to it.

The layers are walked from the first to the last, with a text and with every token alone behind the
token that begins a text. Each is fitted on what the student's layers before it make of both, to
bring its stream back to that of the dense network. Of a token that the text lacks, what it does
alone is all that is known; of others it counts as one occurrence more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from edge_memllm.modeling.feed_forward import SwiGLU
from edge_memllm.modeling.feed_forward_split import TokenGroups, split_neurons
from edge_memllm.modeling.memory_regression import fit_memory_networks
from edge_memllm.modeling.network import DecoderLayer, MemoryLLMForCausalLM

_BATCH_POSITIONS = 4096  # in a layer at once

Progress = Callable[[str, int, int], None]


def initialize(
    student: MemoryLLMForCausalLM,
    teacher: MemoryLLMForCausalLM,
    ids: torch.Tensor,
    boundary: int,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Give a ``student`` with memory weights made of the dense ``teacher``'s and a text.

    ``ids`` [W, T] are windows of the text, ``boundary`` the token that begins one. All three are on
    one device.
    """
    copy_shared(student, teacher)
    with torch.no_grad():
        rows = _Walk(student, teacher, ids, boundary).fit(progress)
        counts = 1 + torch.bincount(ids.flatten(), minlength=len(rows))
    _store(student, rows, counts, progress)


def copy_shared(student: MemoryLLMForCausalLM, teacher: MemoryLLMForCausalLM) -> None:
    """Copy what both have in the same shape: all of a dense student, else all but FFN-C and M."""
    own = student.state_dict()
    same = {
        name: weight
        for name, weight in teacher.state_dict().items()
        if name in own and own[name].shape == weight.shape
    }
    student.load_state_dict(same, strict=False)


@dataclass
class _Passage:
    """Windows of tokens on their way through both networks; streams are [W, T, D]."""

    stream: torch.Tensor  # the student's
    truth: torch.Tensor  # the dense network's
    rotary: Any

    @classmethod
    def start(cls, ids: torch.Tensor, teacher: MemoryLLMForCausalLM) -> _Passage:
        stream = functional.embedding(ids, teacher.model.embed_tokens.weight)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        rotary = teacher.model.rotary_emb(stream, position_ids=positions)
        return cls(stream, stream.clone(), rotary)

    def attend(self, student: DecoderLayer, teacher: DecoderLayer) -> None:
        """Take the student's stream through its attention, and the truth through all of a layer."""
        # Without a mask the attention is causal by itself.
        attention = {"attention_mask": None, "position_embeddings": self.rotary}
        windows = max(1, _BATCH_POSITIONS // self.stream.shape[1])
        pairs = zip(self.stream.split(windows), self.truth.split(windows), strict=True)
        for x, truth in pairs:
            x += student.self_attn(student.input_layernorm(x), **attention)[0]
            truth.copy_(teacher(truth, None, None, None, 1.0, **attention))

    def compute(self, layer: DecoderLayer) -> None:
        """Add a layer's FFN-C to the student's stream, in the sequential placement."""
        for x in self.stream.flatten(0, 1).split(_BATCH_POSITIONS):
            x += layer.mlp(layer.post_attention_layernorm(x))

    @property
    def missing(self) -> torch.Tensor:
        """What the student's stream lacks at every position [W * T, D]."""
        return (self.truth - self.stream).flatten(0, 1)


class _Walk:
    """Both networks on the way through a text and through every token alone."""

    def __init__(
        self,
        student: MemoryLLMForCausalLM,
        teacher: MemoryLLMForCausalLM,
        ids: torch.Tensor,
        boundary: int,
    ) -> None:
        self._student, self._teacher = student.model, teacher.model
        tokens = torch.arange(student.config.vocab_size, device=ids.device)
        alone = torch.stack([torch.full_like(tokens, boundary), tokens], dim=1)
        self._ids = [ids, alone]
        self._text, self._alone = (_Passage.start(each, teacher) for each in self._ids)
        self._groups = TokenGroups(ids.flatten(), len(tokens))

    def fit(self, progress: Progress) -> torch.Tensor:
        """Fit FFN-C of all layers, the first first; the rows that go with them [V, L, D]."""
        layers = len(self._teacher.layers)
        rows = []
        for number in range(layers):
            rows.append(self._fit(self._student.layers[number], self._teacher.layers[number]))
            progress("fit", number + 1, layers)
        return torch.stack(rows, dim=1)

    def _fit(self, student: DecoderLayer, teacher: DecoderLayer) -> torch.Tensor:
        """Fit a layer and take the student's stream through it; its rows [V, D]."""
        for passage in (self._text, self._alone):
            passage.attend(student, teacher)
        if self._student.config.has_compute:
            self._fit_compute(student, teacher.mlp)
            for passage in (self._text, self._alone):
                passage.compute(student)
        rows = self._alone.missing[1::2].clone()  # behind the boundary
        rows.index_add_(0, self._groups.index, self._text.missing)
        rows /= 1 + self._groups.counts.unsqueeze(1)
        for passage, ids in zip((self._text, self._alone), self._ids, strict=True):
            passage.stream += functional.embedding(ids, rows)
        return rows

    def _fit_compute(self, student: DecoderLayer, dense: SwiGLU) -> None:
        normed = student.post_attention_layernorm(self._text.stream.flatten(0, 1))
        compute = student.mlp
        width = compute.down_proj.in_features
        kept, weights = split_neurons(dense, width, normed, self._text.missing, self._groups)
        compute.gate_proj.weight.copy_(dense.gate_proj.weight[kept])
        compute.up_proj.weight.copy_(dense.up_proj.weight[kept])
        compute.down_proj.weight.copy_(weights.T)


def _store(
    student: MemoryLLMForCausalLM, rows: torch.Tensor, counts: torch.Tensor, progress: Progress
) -> None:
    """Keep the rows [V, L, D] as the network keeps its memory.

    Where an FFN-M computes them it is fitted to them, and where there are trained rows as well
    these hold what it misses. A token has weight by its ``counts`` [V].
    """
    network = student.model
    if student.config.has_memory_network:
        fit_memory_networks(network, rows, counts, progress)
    table = network.token_memory.rows
    if table is None:
        return
    with torch.no_grad():
        if student.config.has_memory_network:
            for part in torch.arange(len(rows), device=rows.device).split(_BATCH_POSITIONS):
                rows[part] -= network.memory_rows(part)
        table.weight.copy_(rows.flatten(1))
