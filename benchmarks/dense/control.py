"""Conversion against its control: students alike but for their rows, distilled alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.dense.judging import difference, window_losses
from benchmarks.dense.kept import kept
from benchmarks.dense.learning import Plan, learn
from benchmarks.dense.students import Distilled, Shape, Student, fit
from benchmarks.dense.texts import Windows, cut_windows, read_documents, two_sides
from benchmarks.environment import environment
from edge_memllm.modeling.configuration import compute_width
from edge_memllm.modeling.conversion import dense_network
from edge_memllm.modeling.data import read_tokenizer

_BETA = 3


@dataclass(frozen=True)
class Size:
    """Windows that are learned from, those of them that first weights come from, held-out ones."""

    learned: int = 128
    fitted: int = 64
    held_out: int = 40
    documents: int = 160
    length: int = 256
    batch: int = 4
    rate: float = 3e-4
    rows: int = 8192
    steps: int = 0  # of distillation at most; 0 reads all windows once


def control(
    model: Path, texts: Sequence[Path], runs: Path, size: Size, only: str | None = None
) -> dict[str, Any]:
    """Fit, distil and judge both students; what is in ``runs`` already is not done again.

    ``only`` names one student, which may be made beside the other; then nothing is returned.
    """
    config = dense_network(model).config
    tokenizer = read_tokenizer(model / "tokenizer.json")
    sides = [two_sides(read_documents(path, size.length, size.documents)) for path in texts]
    learned_side = [text for learned, _ in sides for text in learned]
    held_side = [text for _, held_out in sides for text in held_out]
    cut = partial(
        cut_windows, tokenizer=tokenizer, boundary=int(config.bos_token_id), length=size.length
    )
    learned = cut(learned_side, count=size.learned)
    bench = _Bench(model, learned, cut(held_side, count=size.held_out), runs, size)
    width = compute_width(config.hidden_size, _BETA)
    shapes = {
        "control": Shape([width] * config.num_hidden_layers, 0),
        "rows": Shape([width] * config.num_hidden_layers, min(size.rows, config.vocab_size - 1)),
    }
    if only is not None:
        bench.student(only, shapes[only])
        return {}
    return bench.measured(shapes) | {
        "size": asdict(size),
        "model": {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "neurons": config.intermediate_size,
        },
        "environment": environment(("torch", "transformers", "edge-memllm")),
    }


class _Bench:
    def __init__(
        self, model: Path, learned: Windows, held_out: Windows, runs: Path, size: Size
    ) -> None:
        self.model, self.learned, self.held_out = model, learned, held_out
        self.runs, self.size = runs, size
        self.plan = Plan(len(learned) // size.batch, size.batch, size.rate)

    def measured(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        dense = kept(self.runs, "dense", self._dense)
        students = {name: self.student(name, shape) for name, shape in shapes.items()}
        stages = {}
        for stage in ("fitted", "distilled"):
            stages[stage] = {
                name: self._summary(each[stage], dense) for name, each in students.items()
            }
            one, other = (students[name][stage] for name in ("rows", "control"))
            stages[stage]["rows against control"] = self._summary(one, other)
        return {
            "dense": self._summary(dense, dense),
            "steps": {"planned": self.plan.steps, "made": len(students["rows"]["training"])},
            "tokens": len(students["rows"]["training"]) * self.size.batch * self.size.length,
            "parameters": {name: each["parameters"] for name, each in students.items()},
            "row_values": students["rows"]["row_values"],
            "training": {name: each["training"] for name, each in students.items()},
            **stages,
        }

    def student(self, name: str, shape: Shape) -> dict[str, Any]:
        """All figures of one student, made or taken from before."""
        found: dict[str, Any] = kept(self.runs, name, partial(self._student, name, shape))
        return found

    def _dense(self) -> list[float]:
        network = dense_network(self.model)
        return window_losses(
            lambda ids: network(input_ids=ids, use_cache=False).logits, self.held_out
        ).tolist()

    def _student(self, name: str, shape: Shape) -> dict[str, Any]:
        """All figures of one student: fitted, distilled, and its losses on the way."""
        teacher = dense_network(self.model)
        student = Student(dense_network(self.model).requires_grad_(True), shape, self.learned.ids)
        folder = self.runs / name
        distilled = Distilled(student, teacher)

        def first() -> list[float]:
            fit(student, teacher, self.learned.first(self.size.fitted).ids)
            learn(distilled, self.learned.ids, self.plan, folder, until=0)
            return window_losses(student.logits, self.held_out).tolist()

        fitted = kept(self.runs, f"{name}-fitted", first)
        training = learn(distilled, self.learned.ids, self.plan, folder, self.size.steps or None)
        return {
            "fitted": fitted,
            "distilled": window_losses(student.logits, self.held_out).tolist(),
            "training": training,
            "parameters": student.parameters,
            "row_values": student.rows.weight.numel(),
        }

    def _summary(self, losses: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
        gap = difference(losses, others, self.held_out.document.tolist())
        return {"loss": sum(losses) / len(losses), "difference": asdict(gap)}
