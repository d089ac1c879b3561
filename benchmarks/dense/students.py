"""Students of a dense model: narrower feed-forward networks, with rows of tokens beside or without.

Both kinds are made and trained alike, so that rows are all they differ in: the same neurons' worth
of width, the same text, the same losses, a row of its own for the token that begins each window
(what a layer puts out there is a constant, and a large one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.dense.learning import Adam, Rows
from edge_memllm.modeling.distillation import divergence, hidden_distance
from edge_memllm.modeling.fitting import TokenGroups, split_neurons
from edge_memllm.modeling.network import SwiGLU
from edge_memllm.modeling.token_means import Occurrences, token_means

_BATCH = 8  # windows on their way through a layer at once


@dataclass(frozen=True)
class Shape:
    """Neurons kept in each layer [L], and how many tokens have rows."""

    widths: Sequence[int]
    rows: int


class Student:
    """A network with some of the dense one's neurons, and rows behind its layers."""

    def __init__(self, network: Any, shape: Shape, learned: torch.Tensor) -> None:
        """Take a copy of the dense network, which becomes the student's own.

        Rows are for the first token of the windows ``learned`` [W, T] and for those that are most
        frequent in them.
        """
        self.network, self.shape = network, shape
        counts = torch.bincount(learned[:, 1:].flatten(), minlength=network.config.vocab_size)
        counts[learned[0, 0]] = learned.numel()  # the boundary, always
        tokens = counts.argsort(descending=True, stable=True)[: shape.rows + 1]
        self.rows = Rows(network, tokens.sort().values)
        for layer, width in zip(network.model.layers, shape.widths, strict=True):
            layer.mlp = SwiGLU(network.config.hidden_size, width)
        self.others = shape.rows > 0  # whether tokens without a row share one

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, V]."""
        self.rows.prepare(ids)
        with self.rows.inside():
            found: torch.Tensor = self.network(input_ids=ids, use_cache=False).logits
        return found

    @property
    def parameters(self) -> int:
        """Numbers in the student's matrices; rows are not among them."""
        return sum(weight.numel() for weight in self.network.parameters())


@torch.no_grad()
def fit(student: Student, teacher: Any, ids: torch.Tensor) -> None:
    """Give a student its first weights, layer after layer, by windows ``ids`` [W, T] of text.

    Neurons and their output weights make up for what the stream lacks: within each token where
    rows are to say what is the same in all its occurrences, else as it is.
    """
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    stream = teacher.model.embed_tokens(ids)
    truth = stream.clone()
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = teacher.model.rotary_emb(stream, position_ids=positions)
    attention = {"attention_mask": None, "position_embeddings": rotary}
    places = student.rows.place[ids]
    for number, dense in enumerate(teacher.model.layers):
        own = student.network.model.layers[number]
        for x, y in zip(stream.split(_BATCH), truth.split(_BATCH), strict=True):
            x += own.self_attn(own.input_layernorm(x), **attention)[0]
            y.copy_(dense(y, None, None, None, 1.0, **attention))
        missing = (truth - stream)[~first]
        read = own.post_attention_layernorm(stream[~first])
        groups = TokenGroups(ids[~first], student.network.config.vocab_size)
        _fit_neurons(own.mlp, dense.mlp, read, missing, groups if student.others else None)
        for x in stream.split(_BATCH):
            x += own.mlp(own.post_attention_layernorm(x))
        _fit_rows(student, number, truth - stream, places, first)
        stream += student.rows.weight[places, number]
        print(f"fit {number + 1}/{len(teacher.model.layers)}", flush=True)


def _fit_neurons(
    own: SwiGLU,
    dense: SwiGLU,
    read: torch.Tensor,
    missing: torch.Tensor,
    groups: TokenGroups | None,
) -> None:
    width = own.down_proj.in_features
    kept, weights = split_neurons(dense, width, read, missing, groups)
    own.gate_proj.weight.copy_(dense.gate_proj.weight[kept])
    own.up_proj.weight.copy_(dense.up_proj.weight[kept])
    own.down_proj.weight.copy_(weights.T)


def _fit_rows(
    student: Student,
    layer: int,
    missing: torch.Tensor,
    places: torch.Tensor,
    first: torch.Tensor,
) -> None:
    """Give the first position its constant, and tokens their means where they have rows."""
    table = student.rows.weight
    if student.others:
        seen = Occurrences.none(len(table), table.shape[2], missing)
        seen.add(places[~first], missing[~first])
        table[:, layer] = token_means(seen, [seen.mean()]).rows
    table[places[0, 0], layer] = missing[first].mean(dim=0)


class Distilled:
    """A student that learns what the teacher predicts and what its layers put out."""

    def __init__(self, student: Student, teacher: Any) -> None:
        self.student, self.teacher, self.adam = student, teacher, Adam()
        self._weights = {
            name: weight
            for name, weight in student.network.named_parameters()
            if weight.requires_grad
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, rows and moments."""
        weights = {f"weight.{n}": w.detach() for n, w in self._weights.items()}
        return {**weights, "rows": self.student.rows.weight, **self.adam.state}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what ``state`` gave."""
        moments = dict(state)
        self.student.rows.weight.copy_(moments.pop("rows"))
        for name, weight in self._weights.items():
            weight.data.copy_(moments.pop(f"weight.{name}"))
        self.adam.state = moments

    def step(self, ids: torch.Tensor, rate: float) -> float:
        """Learn from windows [B, T]; the loss before."""
        wanted: list[torch.Tensor] = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _kept(self.teacher, wanted):
            target = self.teacher(input_ids=ids, use_cache=False).logits
        found: list[torch.Tensor] = []
        rows = self.student.rows
        rows.prepare(ids, learning=True)
        network = self.student.network
        # Rows first: what is kept is the stream with them.
        with torch.autocast("cpu", torch.bfloat16), rows.inside(), _kept(network, found):
            logits = network(input_ids=ids, use_cache=False).logits
        pairs = zip(found, wanted, strict=True)
        hidden = torch.stack([hidden_distance(a, b) for a, b in pairs]).mean()
        loss = hidden + divergence(logits, target)
        loss.backward()
        with torch.no_grad():
            torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
            for name, weight in self._weights.items():
                assert weight.grad is not None
                self.adam.move(name, weight, weight.grad, rate)
                weight.grad = None
            rows.move(self.adam, rate)
        return loss.item()


class _kept:  # noqa: N801  # used as a function is
    """Keep what the layers of a network put out, while it is entered."""

    def __init__(self, network: Any, into: list[torch.Tensor]) -> None:
        self._network, self._into = network, into
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [
            layer.register_forward_hook(lambda _, __, output: self._into.append(output))
            for layer in self._network.model.layers
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
