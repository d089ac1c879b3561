"""Rows added to a frozen model, learned from one domain's text, beside LoRA and beside nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.dense.judging import difference, window_losses
from benchmarks.dense.kept import kept
from benchmarks.dense.learning import Adam, Plan, Rows, add_low_rank, learn
from benchmarks.dense.texts import Windows, cut_windows, read_documents, two_sides
from benchmarks.environment import environment
from edge_memllm.modeling.conversion import dense_network
from edge_memllm.modeling.data import read_tokenizer
from edge_memllm.modeling.trainer import next_token_loss

RATES = {"rows": (3e-3, 1e-2, 3e-2, 1e-1), "lora": (1e-3, 3e-3, 1e-2)}
_SEARCH_STEPS = 8


@dataclass(frozen=True)
class Size:
    """How much text: windows learned from, held-out ones, those that choose the learning rate."""

    learned: int = 128
    held_out: int = 46
    tuning: int = 8
    length: int = 256
    batch: int = 4
    rank: int = 8


class RowLearner:
    """A frozen network with rows that learn."""

    def __init__(self, network: Any, tokens: torch.Tensor) -> None:
        self.network, self.rows, self.adam = network, Rows(network, tokens), Adam()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments."""
        return {"weight": self.rows.weight, **self.adam.state}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what ``state`` gave."""
        moments = dict(state)
        self.rows.weight = moments.pop("weight")
        self.adam.state = moments

    def step(self, ids: torch.Tensor, rate: float) -> float:
        """Learn from windows [B, T]; the loss before."""
        self.rows.prepare(ids, learning=True)
        with self.rows.inside():
            loss = _loss(self.network, ids)
        loss.backward()
        self.rows.move(self.adam, rate)
        return loss.item()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, V]."""
        self.rows.prepare(ids)
        with self.rows.inside():
            return _logits(self.network, ids)


class LowRankLearner:
    """A frozen network with LoRA beside every matrix of its layers."""

    def __init__(self, network: Any, rank: int) -> None:
        self.network, self.adam = network, Adam()
        self.weights = add_low_rank(network, rank)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments."""
        return {**{f"weight.{n}": w.detach() for n, w in self.weights.items()}, **self.adam.state}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what ``state`` gave."""
        moments = dict(state)
        for name, weight in self.weights.items():
            weight.data.copy_(moments.pop(f"weight.{name}"))
        self.adam.state = moments

    def step(self, ids: torch.Tensor, rate: float) -> float:
        """Learn from windows [B, T]; the loss before."""
        loss = _loss(self.network, ids)
        loss.backward()
        with torch.no_grad():
            for name, weight in self.weights.items():
                assert weight.grad is not None
                self.adam.move(name, weight, weight.grad, rate)
                weight.grad = None
        return loss.item()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, V]."""
        return _logits(self.network, ids)


def _logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=ids, use_cache=False).logits
    return found


def _loss(network: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = _logits(network, ids)
    return next_token_loss(logits, ids)


def retrofit(
    model: Path, texts: Sequence[Path], runs: Path, size: Size, only: str | None = None
) -> dict[str, Any]:
    """Train and judge all of it, or ``only`` one kind; what is in ``runs`` is not done again."""
    network = dense_network(model)
    tokenizer = read_tokenizer(model / "tokenizer.json")
    boundary = int(network.config.bos_token_id)
    learned, held_out = two_sides(
        [text for path in texts for text in read_documents(path, size.length)]
    )

    def cut(side: Sequence[str], count: int, offset: float = 0.0) -> Windows:
        return cut_windows(side, tokenizer, boundary, size.length, count, offset)

    sides = _Sides(cut(learned, size.learned), cut(learned, size.tuning, 0.5), None)
    sides = replace(sides, held_out=cut(held_out, size.held_out))
    bench = _Bench(model, sides, runs, size)
    return bench.measured([only] if only else list(RATES)) | {
        "model": {"layers": network.config.num_hidden_layers, "width": network.config.hidden_size},
        "documents": {"learned": len(learned), "held_out": len(held_out)},
        "environment": environment(("torch", "transformers", "edge-memllm")),
    }


@dataclass(frozen=True)
class _Sides:
    learned: Windows
    tuning: Windows
    held_out: Windows | None


class _Bench:
    def __init__(self, model: Path, sides: _Sides, runs: Path, size: Size) -> None:
        self.model, self.sides, self.runs, self.size = model, sides, runs, size
        self.tokens = sides.learned.ids.unique()

    def measured(self, kinds: Sequence[str]) -> dict[str, Any]:
        steps = len(self.sides.learned) // self.size.batch
        base = kept(self.runs, "base", self._base)
        found = {
            "size": asdict(self.size),
            "steps": steps,
            "learned_tokens": steps * self.size.batch * self.sides.learned.ids.shape[1],
            "row_tokens": len(self.tokens),
            "base": self._summary(base, base),
        }
        for kind in kinds:
            rate, search = self._searched(kind)
            losses = kept(self.runs, f"{kind}-final", partial(self._final, kind, rate, steps))
            found[kind] = {
                "rate": rate,
                "search": search,
                **{name: self._summary(each, base) for name, each in losses.items()},
            }
        return found

    def _base(self) -> list[float]:
        return self._judged(partial(_logits, dense_network(self.model)))

    def _learner(self, kind: str) -> RowLearner | LowRankLearner:
        network = dense_network(self.model)
        if kind == "rows":
            return RowLearner(network, self.tokens)
        return LowRankLearner(network, self.size.rank)

    def _searched(self, kind: str) -> tuple[float, dict[str, float]]:
        """The learning rate that is best on the tuning windows after a few steps."""
        found = {}
        for rate in RATES[kind]:
            name = f"{kind}-search-{rate:g}"
            found[rate] = kept(self.runs, name, partial(self._tried, kind, rate, name))
        return min(found, key=lambda each: found[each]), {f"{k:g}": v for k, v in found.items()}

    def _tried(self, kind: str, rate: float, name: str) -> float:
        learner = self._learner(kind)
        plan = Plan(_SEARCH_STEPS, self.size.batch, rate, save_every=_SEARCH_STEPS + 1)
        learn(learner, self.sides.learned.ids, plan, self.runs / name)
        (self.runs / name / "state.safetensors").unlink(missing_ok=True)
        return float(window_losses(learner.logits, self.sides.tuning).mean())

    def _final(self, kind: str, rate: float, steps: int) -> dict[str, list[float]]:
        learner = self._learner(kind)
        plan = Plan(steps, self.size.batch, rate)
        learn(learner, self.sides.learned.ids, plan, self.runs / f"{kind}-{rate:g}")
        found = {"all": self._judged(learner.logits)}
        if isinstance(learner, RowLearner):
            found |= self._parts(learner)
        return found

    def _parts(self, learner: RowLearner) -> dict[str, list[float]]:
        """Losses with a part of the rows alone: by token, and by layer."""
        rows, found = learner.rows, {}
        whole, first = rows.weight, int(rows.place[self.sides.learned.ids[0, 0]])
        only, without = torch.zeros_like(whole), whole.clone()
        only[first], without[first] = whole[first], 0
        for name, weight in (("first token alone", only), ("without the first token", without)):
            rows.weight = weight
            found[name] = self._judged(learner.logits)
        rows.weight = whole
        layers = int(learner.network.config.num_hidden_layers)
        third = max(1, layers // 3)
        for name, part in {
            "first third of the layers": range(third),
            "middle third": range(third, 2 * third),
            "last third": range(2 * third, layers),
        }.items():
            rows.layers = set(part)
            found[name] = self._judged(learner.logits)
        return found

    def _judged(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        assert self.sides.held_out is not None
        return window_losses(logits, self.sides.held_out).tolist()

    def _summary(self, losses: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
        assert self.sides.held_out is not None
        gap = difference(losses, base, self.sides.held_out.document.tolist())
        return {"loss": sum(losses) / len(losses), "against_nothing": asdict(gap)}
