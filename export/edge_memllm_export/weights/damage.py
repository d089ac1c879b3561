"""What rounding a matrix costs the whole network, in nats: known from one pass back through it.

An error D of a matrix adds D x to an output whose gradient is g. To second order the divergence of
the network's predictions is E[(g D x)^2] / 2, where g is the gradient of the loss on a token that
the network itself drew (the Fisher information). Taking the rows of the output as independent, that
is sum_n share_n D_n G D_n^T / 2 with G = E[|g|^2 x x^T]: all that is kept of a pass are G and the
rows' shares of |g|^2. Codes should be chosen by G too: it knows which tokens matter. Some networks
have activations a thousand times as large at the first position of a text as elsewhere; X^T X
counts it too much, and a text without it costs everything.

A product that rounds its inputs too (accuracy level 4 of MatMulNBits) misses by W e where e is
uniform in a step of the block's largest input over 127.
It knows torch modules, nothing of our network, of files and of graphs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_memllm.arrays import Floats
from edge_memllm.artifact.atomic import not_written

INPUT_BLOCKS = (32, 64, 128, 256)  # of inputs that a product may round together
_INPUT_CODES = 127
# Moments that are more than this lie in a file without a name, where the system may put them aside.
_IN_MEMORY = 1 << 26


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much the loss minds errors of one matrix [N, K].

    Attributes:
        moment: [K, K], the mean over tokens of ``|g|^2 x x^T``.
        rows: [N], the share of each row of the matrix in all of ``|g|^2``; they add up to 1.
        inputs: By size of block, [ceil(K / block)]: the mean of ``|g|^2 step^2 / 12``, where a step
            is the largest input of the block over 127.
    """

    moment: Floats
    rows: Floats
    inputs: Mapping[int, Floats]

    def of_error(self, missed: Floats) -> float:
        """Return the expected divergence, nats per token, of an error [N, K] of the weights."""
        rows = np.einsum("nk,nk->n", missed @ self.moment, missed)
        return float(self.rows.astype(np.float64) @ rows) / 2

    def of_rounded_inputs(self, weight: Floats, blocks: Iterable[int]) -> dict[int, float]:
        """Return that of rounding inputs of a matrix [N, K] to 8 bits, by the size of blocks."""
        columns = (self.rows @ np.square(weight)).astype(np.float64)
        padded = {block: np.pad(columns, (0, -len(columns) % block)) for block in blocks}
        return {
            block: float(each.reshape(-1, block).sum(axis=1) @ self.inputs[block]) / 2
            for block, each in padded.items()
        }


def measure_sensitivities(
    network: nn.Module,
    matrices: Mapping[str, Sequence[nn.Module]],
    logits: Callable[[torch.Tensor], torch.Tensor],
    windows: Sequence[torch.Tensor],
    progress: Callable[[int], None] = lambda done: None,
    *,
    moments: bool = True,
    scratch: Path | None = None,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """Return how sensitive the network is to each matrix.

    ``matrices`` are linear modules of it by name; several that read the same are one matrix whose
    rows they make up in turn. ``logits`` runs the network, each of these modules once, from ids
    [B, T] to [B, T, V]; of ``windows`` [B, T] each is run by itself, and ``progress(windows done)``
    called. Without ``moments`` these are empty, [0, 0]; large ones lie in a file in the folder
    ``scratch``. No parameter gathers a gradient. The same seed draws the same tokens. Raises
    FloatingPointError for logits that are not finite, StorageError where there is no room.
    """
    generator = torch.Generator().manual_seed(seed)
    heard = {name: _Heard(modules) for name, modules in matrices.items()}
    if moments:
        _make_room(heard.values(), scratch)
    handles = [
        module.register_forward_hook(partial(each.listen, place))
        for each, modules in zip(heard.values(), matrices.values(), strict=True)
        for place, module in enumerate(modules)
    ]
    learning = [each for each in network.parameters() if each.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for done, ids in enumerate(windows, start=1):
            _pass_back(logits, ids, generator)
            progress(done)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return {name: each.sensitivity() for name, each in heard.items()}


class _Heard:
    """What is summed up of one matrix."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._widths = [int(module.weight.shape[0]) for module in modules]
        self.columns = int(modules[0].weight.shape[1])
        self.moment = torch.zeros(0, 0)
        self._rows = torch.zeros(sum(self._widths))
        self._inputs = {
            block: torch.zeros(-(-self.columns // block), dtype=torch.float64)
            for block in INPUT_BLOCKS
        }
        self._count = self._awaited = 0
        self._x: torch.Tensor | None = None
        self._power: torch.Tensor | None = None

    def listen(self, place: int, _: nn.Module, inputs: tuple[torch.Tensor], output: Any) -> Any:
        """Keep a module's inputs, and wait for the gradient of its output, which is returned."""
        given = output
        if not output.requires_grad:  # the first matrices of the network
            given = output.requires_grad_().clone()  # which may be changed in place
        if place == 0:
            self._x, self._power = inputs[0].detach().float().flatten(0, -2), None
            self._awaited = len(self._widths)
        output.register_hook(partial(self._hear, place))
        return given

    def _hear(self, place: int, gradient: torch.Tensor) -> None:
        squares = gradient.detach().float().flatten(0, -2).square()
        power = squares.sum(dim=1)
        self._power = power if self._power is None else self._power + power
        start = sum(self._widths[:place])
        self._rows[start : start + self._widths[place]] += squares.sum(dim=0)
        self._awaited -= 1
        if not self._awaited and self._x is not None:
            self._add(self._x, self._power)
            self._x = self._power = None

    def _add(self, x: torch.Tensor, power: torch.Tensor) -> None:
        self._count += len(x)
        if self.moment.numel():
            self.moment.addmm_(x.T, x * power[:, None])
        for block, total in self._inputs.items():
            padded = nn.functional.pad(x, (0, -x.shape[1] % block))
            steps = padded.unflatten(1, (-1, block)).abs().amax(dim=2) / _INPUT_CODES
            total += (power.double() @ steps.double().square()) / 12

    def sensitivity(self) -> Sensitivity:
        """All of it, as means over tokens."""
        count = max(1, self._count)
        total = self._rows.sum().clamp_min(torch.finfo(torch.float32).tiny)
        inputs = {block: (each / count).float().numpy() for block, each in self._inputs.items()}
        moment = self.moment.div_(count).numpy()
        return Sensitivity(moment, (self._rows / total).numpy(), inputs)


def _mapped(count: int, folder: Path | None) -> np.memmap[Any, np.dtype[np.float32]]:
    """So many zeros in a file without a name, whose place on the disk is taken before.

    A disk that is full when a page of it is written would end the process.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            file.truncate(4 * count)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * count)
        except OSError as error:
            raise not_written(folder or Path(tempfile.gettempdir()), error) from error
        return np.memmap(file, np.float32, "r+", shape=(count,))


def _make_room(heard: Iterable[_Heard], scratch: Path | None) -> None:
    """Give each its moment, all zero."""
    several = list(heard)
    counts = [each.columns**2 for each in several]
    if 4 * sum(counts) <= _IN_MEMORY:
        whole = torch.zeros(sum(counts))
    else:
        whole = torch.from_numpy(_mapped(sum(counts), scratch))
    for each, part in zip(several, whole.split(counts), strict=True):
        each.moment = part.view(each.columns, each.columns)


@torch.enable_grad()
def _pass_back(
    logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, generator: torch.Generator
) -> None:
    """Run a window, draw a token at every position, and pass the loss of these tokens back."""
    found = logits(ids).float().flatten(0, -2)
    with torch.no_grad():
        chances = found.softmax(dim=-1)
        if not chances.isfinite().all():
            raise FloatingPointError("logits are not finite")
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
        del chances  # as large as all that the pass back keeps of the logits
    nn.functional.cross_entropy(found, drawn, reduction="sum").backward()
