"""Learning from windows: rows of tokens, LoRA, Adam, and a loop that goes on where it stopped.

Its state is tensors alone, kept as safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

_BETAS, _EPSILON = (0.9, 0.95), 1e-8
LORA_SCALE = 2.0
_FLOOR = 0.1  # of the learning rate, where the cosine ends


@dataclass(frozen=True)
class Plan:
    """How long and how fast; ``batch`` windows are one step."""

    steps: int
    batch: int
    rate: float
    warm_up: int = 4
    seed: int = 0
    save_every: int = 8

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2)


class Adam:
    """Adam without decay; of rows it moves those that a step used, each by its own count."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def move(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Move a whole weight in place."""
        mean, square = self._moments(name, weight)
        count = self.state.setdefault(f"{name}.count", torch.zeros(1))
        count += 1
        self._step(weight, mean, square, gradient, rate, count)

    def move_rows(
        self,
        name: str,
        weight: torch.Tensor,
        used: torch.Tensor,
        gradient: torch.Tensor,
        rate: float,
    ) -> None:
        """Move the rows ``used`` [U] of a weight [N, ...] in place by ``gradient`` [U, ...]."""
        mean, square = self._moments(name, weight)
        counts = self.state.setdefault(f"{name}.count", torch.zeros(len(weight)))
        counts[used] += 1
        shape = (-1, *[1] * (weight.dim() - 1))
        parts = [weight[used], mean[used], square[used]]
        self._step(*parts, gradient, rate, counts[used].view(shape))
        for whole, part in zip((weight, mean, square), parts, strict=True):
            whole[used] = part

    def _moments(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.state.setdefault(f"{name}.mean", torch.zeros_like(weight))
        return mean, self.state.setdefault(f"{name}.square", torch.zeros_like(weight))

    @staticmethod
    def _step(
        weight: torch.Tensor,
        mean: torch.Tensor,
        square: torch.Tensor,
        gradient: torch.Tensor,
        rate: float,
        count: torch.Tensor,
    ) -> None:
        first, second = _BETAS
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second**count)).sqrt_().add_(_EPSILON)
        weight.sub_(rate / (1 - first**count) * mean / root)


class Rows:
    """Rows [N + 1, L, D] of N tokens, added to the stream behind each layer; all others share one.

    While ``inside`` a network they are added; ``layers`` says behind which (None: all).
    """

    def __init__(self, network: Any, tokens: torch.Tensor) -> None:
        """Rows of ``tokens`` [N], all zero."""
        config = network.config
        shape = len(tokens) + 1, config.num_hidden_layers, config.hidden_size
        self.weight = torch.zeros(shape)
        self.place = torch.full((config.vocab_size,), len(tokens))
        self.place[tokens] = torch.arange(len(tokens))
        self.layers: set[int] | None = None
        self._network = network
        self._used: torch.Tensor | None = None
        self._leaf: torch.Tensor | None = None
        self._index: torch.Tensor | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Add the rows behind the network's layers."""
        layers = self._network.model.layers
        hooks = [
            layer.register_forward_hook(self._adding(number)) for number, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def prepare(self, ids: torch.Tensor, *, learning: bool = False) -> None:
        """Say which tokens [B, T] the network is about to read."""
        self._used, self._index = torch.unique(self.place[ids], return_inverse=True)
        self._leaf = self.weight[self._used].requires_grad_(learning)

    def move(self, adam: Adam, rate: float) -> None:
        """Learn from the gradient of what was read last."""
        assert self._leaf is not None and self._used is not None and self._leaf.grad is not None
        adam.move_rows("rows", self.weight, self._used, self._leaf.grad, rate)

    def _adding(self, number: int) -> Any:
        def added(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if self.layers is not None and number not in self.layers:
                return output
            assert self._leaf is not None and self._index is not None
            return output + functional.embedding(self._index, self._leaf[:, number])

        return added


class LowRank(nn.Module):
    """A frozen linear map and a learned product of rank R beside it (LoRA), zero at the start."""

    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale
        self.down = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.frozen(x) + functional.linear(functional.linear(x, self.down), self.up) * (
            self.scale
        )


def add_low_rank(network: Any, rank: int, seed: int = 0) -> dict[str, nn.Parameter]:
    """Put LoRA of that rank beside every matrix of the layers; what is learned, by name."""
    torch.manual_seed(seed)
    layers = network.model.layers
    linear = [(n, m) for n, m in layers.named_modules() if isinstance(m, nn.Linear)]
    for name, module in linear:
        parent, _, last = name.rpartition(".")
        setattr(layers.get_submodule(parent), last, LowRank(module, rank, LORA_SCALE))
    return {n: p for n, p in layers.named_parameters() if n.endswith((".up", ".down"))}


class Learner(Protocol):
    """What the loop trains."""

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that changes while learning."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what ``state`` gave."""

    def step(self, ids: torch.Tensor, rate: float) -> float:
        """Learn from windows [B, T]; the loss before."""


def learn(
    learner: Learner, ids: torch.Tensor, plan: Plan, folder: Path, until: int | None = None
) -> list[float]:
    """Train on windows ``ids`` [W, T], from where a run in ``folder`` stopped; losses by step.

    One pass in an order of the plan's seed, again in another where the windows do not last.
    ``until`` so many steps are made in all; 0 keeps what the learner begins with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "state.safetensors"
    losses: list[float] = []
    if file.exists():
        losses = _restore(learner, file)
    end = plan.steps if until is None else min(plan.steps, until)
    if end == 0:
        _save(learner, file, losses)
    for step in range(len(losses), end):
        losses.append(learner.step(_batch(ids, plan, step), plan.rate_at(step)))
        print(f"{folder.name} {step + 1}/{plan.steps} {losses[-1]:.4f}", flush=True)
        if (step + 1) % plan.save_every == 0 or step + 1 == end:
            _save(learner, file, losses)
    return losses


def _save(learner: Learner, file: Path, losses: list[float]) -> None:
    part = file.with_suffix(".part")
    state = {name: each.contiguous() for name, each in learner.state().items()}
    save_file(state, part, metadata={"losses": json.dumps(losses)})
    os.replace(part, file)


def _restore(learner: Learner, file: Path) -> list[float]:
    with safe_open(file, "pt") as opened:
        learner.restore({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        losses: list[float] = json.loads(opened.metadata()["losses"])
    return losses


def _batch(ids: torch.Tensor, plan: Plan, step: int) -> torch.Tensor:
    per_pass = len(ids) // plan.batch
    number, place = divmod(step, per_pass)
    generator = torch.Generator().manual_seed(plan.seed * 1000 + number)
    order = torch.randperm(len(ids), generator=generator)
    return ids[order[place * plan.batch : (place + 1) * plan.batch]]
