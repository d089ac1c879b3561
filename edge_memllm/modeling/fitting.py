"""A student's first weights: the dense network's own where there are such, else fitted to it.

Three steps: neurons are split between FFN-C and what a token alone decides; FFN-M is fitted to
that by regression; and both go layer by layer.

The layers are walked from the first to the last, with a text and with every token planted once in
it, in the place of another. Each is fitted on what the student's layers before it make of both, to
bring its stream back to that of the dense network. Of a token that the text lacks, what it does
where it was planted is all that is known; of others it counts as one occurrence more. Behind the
token that begins a text by itself a token does something else: much attention goes to that one.

Where every window begins with the token that begins a text, what is missing at that position is the
same in all of them, often long, and no other position's: it is that token's row, and counts for
nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from edge_memllm.modeling.network import DecoderLayer, MemoryLLMForCausalLM, MemoryLLMModel, SwiGLU
from edge_memllm.progress import Progress

_CHUNK = 4096  # positions worked on at once
_ROUNDS = 64  # in which neurons are dropped; one at a time is no better
_RIDGE = 1e-2  # of the mean variance of a neuron: pulls to the dense output weights

_STEPS, _PASSES = 600, 16  # at least so many steps, and draws of each token in the mean
_BATCH = 1024  # tokens a step, or the whole vocabulary where that is less
_RATE = 5e-3  # for an FFN-M of 256 columns; less for wider ones


_BATCH_POSITIONS = 4096  # in a layer at once
_APART = 4  # from one planted token to the next


class TokenGroups:
    """Positions of a text by their token, in chunks of whole or, for frequent tokens, cut groups.

    ``index`` LongTensor [N] gives the number of the token at every position.
    """

    def __init__(self, index: torch.Tensor, tokens: int) -> None:
        self.index = index
        self.counts = torch.bincount(index, minlength=tokens)
        self._order = torch.argsort(index, stable=True)

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Positions [n], and the place of each one's group among those of the chunk."""
        for positions in self._order.split(_CHUNK):
            _, group = torch.unique_consecutive(self.index[positions], return_inverse=True)
            yield positions, group


def planted(ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [W', T] of a text with each of so many tokens once, in the places [P] of others.

    ``ids`` [W, T] is the text, whose first positions are kept. Behind the last token comes the
    first again, until all places are taken: read no more than ``tokens`` of them.
    """
    places = torch.arange(min(_APART, ids.shape[1] - 1), ids.shape[1], _APART, device=ids.device)
    windows = -(-tokens // len(places))
    found = ids[torch.arange(windows, device=ids.device) % len(ids)].clone()
    every = torch.arange(windows * len(places), device=ids.device) % tokens
    found[:, places] = every.view(windows, -1)
    return found, places


def activations(dense: SwiGLU, x: torch.Tensor) -> torch.Tensor:
    """What the neurons of a SwiGLU hand to its output matrix: [n, D] -> [n, K]."""
    return torch.nn.functional.silu(dense.gate_proj(x)) * dense.up_proj(x)


def split_neurons(
    dense: SwiGLU, width: int, x: torch.Tensor, wanted: torch.Tensor, groups: TokenGroups | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` neurons to keep, LongTensor [S], and their output weights [S, D].

    ``x`` [N, D] is what the dense network reads, ``wanted`` [N, D] what is to come out. ``groups``
    None leaves nothing to rows: not what varies within a token is fitted, but all of it.
    """
    neurons = dense.gate_proj.out_features
    moment = x.new_zeros(neurons, neurons, dtype=torch.float64)
    cross = x.new_zeros(neurons, wanted.shape[1], dtype=torch.float64)
    for inside, missing in _inside(dense, x, wanted, groups):
        moment += (inside.T @ inside).double()
        cross += (inside.T @ missing).double()
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    moment.diagonal().add_(ridge)
    cross += ridge * dense.down_proj.weight.T.double()
    kept = _eliminate(moment, cross, width)
    weights = torch.linalg.solve(moment[kept][:, kept], cross[kept])
    return kept, weights.to(x.dtype)


def _inside(
    dense: SwiGLU, x: torch.Tensor, wanted: torch.Tensor, groups: TokenGroups | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Activations [n, K] and what is wanted [n, D], less what rows will say of both."""
    if groups is None:
        for part, missing in zip(x.split(_CHUNK), wanted.split(_CHUNK), strict=True):
            yield activations(dense, part), missing
        return
    for positions, group in groups.chunks():
        inside = _within(activations(dense, x[positions]), group)
        yield inside, _within(wanted[positions], group)


def _eliminate(moment: torch.Tensor, cross: torch.Tensor, width: int) -> torch.Tensor:
    """Drop neurons, those first whose loss the others make up for best, until ``width`` are left.

    Without neuron k the squared error grows by ``|w_k|^2 / inverse_kk``, the other weights refit.
    """
    left = torch.arange(len(moment), device=moment.device)
    inverse = torch.linalg.inv(moment)
    weights = inverse @ cross
    step = -(-max(0, len(left) - width) // _ROUNDS)
    while len(left) > width:
        cost = weights.square().sum(dim=1) / inverse.diagonal()
        order = torch.argsort(cost, stable=True)
        cut = min(step, len(left) - width)
        out, keep = order[:cut], order[cut:].sort().values
        passed_on = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weights = (weights - passed_on.T @ weights[out])[keep]
        inverse = (inverse - inverse[:, out] @ passed_on)[keep][:, keep]
        left = left[keep]
    return left


def _within(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """``values`` [n, D] less the mean of their group; groups are numbered in order."""
    counts = torch.bincount(group).unsqueeze(1)
    means = values.new_zeros(len(counts), values.shape[1]).index_add_(0, group, values) / counts
    return values - means[group]


def fit_memory_networks(
    network: MemoryLLMModel, rows: torch.Tensor, counts: torch.Tensor, progress: Progress
) -> None:
    """Fit every layer's FFN-M to its ``rows`` [V, L, D].

    A token is drawn the more often the higher its ``counts`` [V], by their square root: rare
    tokens have rows too. Deterministic.
    """
    source = network.embed_tokens.weight.detach()
    if network.token_memory.norm is not None:
        source = network.token_memory.norm(source).detach()
    weights = counts.double().sqrt().cpu()
    for number, layer in enumerate(network.layers):
        _fit(layer, source, rows[:, number], weights, torch.Generator().manual_seed(number))
        progress("memory", number + 1, len(network.layers))


def batch_and_steps(vocabulary: int) -> tuple[int, int]:
    """Tokens drawn in a step, and steps, of the fit over a vocabulary of so many tokens."""
    batch = min(_BATCH, vocabulary)
    return batch, max(_STEPS, math.ceil(_PASSES * vocabulary / batch))


def _fit(
    layer: DecoderLayer,
    source: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    generator: torch.Generator,
) -> None:
    rate = _RATE * (256 / source.shape[1]) ** 0.5
    parameters = [*layer.memory.parameters(), *layer.memory_layernorm.parameters()]
    batch, steps = batch_and_steps(len(rows))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    scale = rows.square().mean()
    with torch.enable_grad():
        for _ in range(steps):
            drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
            drawn = drawn.to(rows.device)
            missed = layer.memory_rows(source[drawn], None) - rows[drawn]
            loss = missed.square().mean() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


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

    def missing(self, start: int = 0, places: torch.Tensor | None = None) -> torch.Tensor:
        """What the student's stream lacks at positions from ``start`` on [W * (T - start), D].

        With ``places`` [P] at those positions alone [W * P, D].
        """
        chosen = slice(start, None) if places is None else places
        return (self.truth[:, chosen] - self.stream[:, chosen]).flatten(0, 1)


class _Walk:
    """Both networks on the way through a text and through the same with every token planted."""

    def __init__(
        self,
        student: MemoryLLMForCausalLM,
        teacher: MemoryLLMForCausalLM,
        ids: torch.Tensor,
        boundary: int,
    ) -> None:
        self._student, self._teacher = student.model, teacher.model
        self._tokens = student.config.vocab_size
        windows, self._places = planted(ids, self._tokens)
        self._ids = [ids, windows]
        self._text, self._planted = (_Passage.start(each, teacher) for each in self._ids)
        self._boundary = boundary
        self._start = int(ids.shape[1] > 1 and bool((ids[:, 0] == boundary).all()))
        self._groups = TokenGroups(ids[:, self._start :].flatten(), self._tokens)

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
        for passage in (self._text, self._planted):
            passage.attend(student, teacher)
        if self._student.config.has_compute:
            self._fit_compute(student, teacher.mlp)
            for passage in (self._text, self._planted):
                passage.compute(student)
        rows = self._planted.missing(places=self._places)[: self._tokens]
        rows.index_add_(0, self._groups.index, self._text.missing(self._start))
        rows /= 1 + self._groups.counts.unsqueeze(1)
        if self._start:
            rows[self._boundary] = self._text.missing()[:: self._ids[0].shape[1]].mean(dim=0)
        for passage, ids in zip((self._text, self._planted), self._ids, strict=True):
            passage.stream += functional.embedding(ids, rows)
        return rows

    def _fit_compute(self, student: DecoderLayer, dense: SwiGLU) -> None:
        stream = self._text.stream[:, self._start :].flatten(0, 1)
        normed, missing = student.post_attention_layernorm(stream), self._text.missing(self._start)
        compute = student.mlp
        width = compute.down_proj.in_features
        kept, weights = split_neurons(dense, width, normed, missing, self._groups)
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
