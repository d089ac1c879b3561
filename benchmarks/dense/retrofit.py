"""Rows added to a frozen model, learned from one domain's text, beside LoRA and beside nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.dense.judging import Difference, difference, window_losses
from benchmarks.dense.kept import kept
from benchmarks.dense.learning import (
    LORA_SCALE,
    Adam,
    LowRank,
    Plan,
    Rows,
    add_low_rank,
    learn,
)
from benchmarks.dense.texts import Windows, cut_windows, read_documents, two_sides
from benchmarks.environment import environment
from edge_memllm.modeling.conversion import dense_network
from edge_memllm.modeling.data import read_tokenizer
from edge_memllm.modeling.trainer import next_token_loss

RATES = {"rows": (3e-3, 1e-2, 3e-2, 1e-1), "lora": (1e-3, 3e-3, 1e-2, 3e-2)}
_SEARCH_STEPS = 8
WHOLE = "all"
THIRDS = ("first third of the layers", "middle third", "last third")


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

    def keep(self, layers: Sequence[int]) -> None:
        """Add rows behind these layers alone."""
        self.rows.layers = set(layers)

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

    def keep(self, layers: Sequence[int]) -> None:
        """Leave what was learned out of all other layers."""
        for number, layer in enumerate(self.network.model.layers):
            for module in layer.modules():
                if isinstance(module, LowRank) and number not in layers:
                    module.scale = 0.0
                elif isinstance(module, LowRank):
                    module.scale = LORA_SCALE

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
        made: dict[str, dict[str, list[float]]] = {}
        for kind in kinds:
            rate, search = self._searched(kind)
            losses = kept(self.runs, f"{kind}-final", partial(self._final, kind, rate, steps))
            made[kind] = losses
            found[kind] = {
                "rate": rate,
                "search": search,
                **{name: self._summary(each, base) for name, each in losses.items()},
            }
        if {"rows", "lora"} <= made.keys():
            found["rows_against_lora"] = self._against(made["rows"], made["lora"])
        return found

    def _against(
        self, rows: Mapping[str, Sequence[float]], lora: Mapping[str, Sequence[float]]
    ) -> dict[str, Any]:
        """Rows against LoRA, whole; and a part of both, where LoRA has its parts judged, too."""
        found = {WHOLE: asdict(self._gap(rows[WHOLE], lora[WHOLE]))}
        if set(THIRDS) <= lora.keys():
            chosen = self._gap(self._chosen(rows), self._chosen(lora))
            found["chosen elsewhere"] = asdict(chosen)
        return found

    def _chosen(self, losses: Mapping[str, Sequence[float]]) -> list[float]:
        """Losses of all layers or a third: for each document what is best on all others."""
        assert self.sides.held_out is not None
        names = (WHOLE, *THIRDS)
        tried = torch.tensor([losses[name] for name in names])
        document, found = self.sides.held_out.document, torch.zeros(tried.shape[1])
        for number in document.unique():
            own = document == number
            best = int(tried[:, ~own].mean(dim=1).argmin())
            found[own] = tried[best, own]
        return found.tolist()

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
        found = {WHOLE: self._judged(learner.logits)}
        if isinstance(learner, RowLearner):
            found |= self._tokens(learner)
        return found | self._thirds(learner)

    def _tokens(self, learner: RowLearner) -> dict[str, list[float]]:
        """Losses with the rows of some tokens alone."""
        rows, found = learner.rows, {}
        whole, first = rows.weight, int(rows.place[self.sides.learned.ids[0, 0]])
        only, without = torch.zeros_like(whole), whole.clone()
        only[first], without[first] = whole[first], 0
        for name, weight in (("first token alone", only), ("without the first token", without)):
            rows.weight = weight
            found[name] = self._judged(learner.logits)
        rows.weight = whole
        return found

    def _thirds(self, learner: RowLearner | LowRankLearner) -> dict[str, list[float]]:
        """Losses with what was learned for some layers alone."""
        found = {}
        layers = int(learner.network.config.num_hidden_layers)
        third = max(1, layers // 3)
        for name, part in zip(
            THIRDS,
            (range(third), range(third, 2 * third), range(2 * third, layers)),
            strict=True,
        ):
            learner.keep(part)
            found[name] = self._judged(learner.logits)
        return found

    def _judged(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        assert self.sides.held_out is not None
        return window_losses(logits, self.sides.held_out).tolist()

    def _summary(self, losses: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
        gap = self._gap(losses, base)
        return {"loss": sum(losses) / len(losses), "against_nothing": asdict(gap)}

    def _gap(self, losses: Sequence[float], others: Sequence[float]) -> Difference:
        assert self.sides.held_out is not None
        return difference(losses, others, self.sides.held_out.document.tolist())
