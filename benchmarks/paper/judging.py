"""What every measurement judges a model by: texts, tasks, and an artifact without rounding.

Graph and table are float32, so that what is measured is the model. Texts are held out from all
training; of each task the first items are taken.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edge_memllm
from benchmarks.paper.runs import Run
from edge_memllm.evaluation import (
    combine,
    mean_result,
    measure_perplexity,
    measure_task,
    read_tasks,
)
from edge_memllm.evaluation.perplexity import Predictor
from edge_memllm.model import Model
from edge_memllm_export import export_model

TEXTS = {
    "Wikipedia": "enwiki-slice/valid.txt",
    "novels": "eltec-eng/valid.txt",
    "Wikitext-2": "wikitext-2/valid.txt",
}
# Of the kinds that were trained on: what figures over all texts mean.
TRAINED = ("Wikipedia", "novels")
TOGETHER = "together"
_TITLE = re.compile(r"^(?== .+ =$)", re.MULTILINE)


@dataclass(frozen=True)
class TaskUse:
    """A task: its file or folder, how many items of each file, and how they are put."""

    path: str
    items: int
    delimiter: str | None = None


_GAUNTLET = "eval-gauntlet"
TASKS = {
    "LAMBADA": TaskUse(f"{_GAUNTLET}/language_understanding/lambada_openai.jsonl", 1000),
    "ARC-Easy": TaskUse(f"{_GAUNTLET}/world_knowledge/arc_easy.jsonl", 600, "\nAnswer: "),
    "Winogrande": TaskUse(f"{_GAUNTLET}/language_understanding/winogrande.jsonl", 600),
    "PIQA": TaskUse("piqa/valid.jsonl", 600),
    "BLiMP": TaskUse("blimp", 15),
}


def titled_documents(path: Path) -> list[str]:
    """Return every document of a file, each with the title line that opens it."""
    return [part for part in _TITLE.split(path.read_text("utf-8")) if part.strip()]


@dataclass(frozen=True)
class Judge:
    """The folder with all texts and tasks, and how much of a text is read."""

    data: Path
    threads: int = 1

    def settings(
        self, texts: tuple[str, ...], characters: int | None, *, tasks: bool
    ) -> dict[str, Any]:
        """Return what the figures depend on, besides the model; no `characters` are all of them."""
        found: dict[str, Any] = {"characters": characters, "texts": {}}
        for name in texts:
            content = (self.data / TEXTS[name]).read_bytes()
            found["texts"][name] = hashlib.sha256(content).hexdigest()[:16]
        if tasks:
            found["tasks"] = {name: [use.path, use.items] for name, use in TASKS.items()}
        return found

    def texts(
        self,
        model: Predictor,
        run: Run,
        names: tuple[str, ...],
        characters: int,
        memory_gain: list[float] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Return the perplexity of texts, and of those of the kinds trained on together.

        Windows are as long as the sequences of the training and advance by half of that.
        """
        found = {}
        for name in names:
            text = (self.data / TEXTS[name]).read_text("utf-8")[:characters]
            found[name] = measure_perplexity(
                model,
                text,
                context=run.context,
                stride=run.context // 2,
                memory_gain=memory_gain,
            )
        together = combine([found[name] for name in TRAINED])
        return {
            name: {
                "perplexity": each.perplexity,
                "nll_per_token": each.nll_per_token,
                "bits_per_byte": each.bits_per_byte,
                "tokens": each.tokens,
            }
            for name, each in {**found, TOGETHER: together}.items()
        }

    def documents(
        self, model: Predictor, run: Run, names: tuple[str, ...]
    ) -> dict[str, dict[str, Any]]:
        """Return nats and tokens of each document of whole texts, and the bytes of all of them."""
        found = {}
        for name in names:
            parts = [
                measure_perplexity(model, text, context=run.context, stride=run.context // 2)
                for text in titled_documents(self.data / TEXTS[name])
            ]
            found[name] = {
                "nll": [round(each.nll, 3) for each in parts],
                "tokens": [each.tokens for each in parts],
                "bytes": sum(each.bytes for each in parts),
            }
        return found

    def tasks(
        self, model: Predictor, memory_gain: list[float] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the scores of all tasks; a folder's is the mean of its files."""
        return {name: self._task(model, name, use, memory_gain) for name, use in TASKS.items()}

    def _task(
        self, model: Predictor, name: str, use: TaskUse, memory_gain: list[float] | None
    ) -> dict[str, Any]:
        path = self.data / use.path
        tasks = read_tasks([path], limit=use.items, delimiter=use.delimiter)
        results = [measure_task(model, task, memory_gain=memory_gain) for task in tasks]
        if path.is_dir():
            return mean_result(name, results).as_dict()
        return results[0].as_dict()


@contextmanager
def opened(checkpoint: Path, threads: int, codec: str = "f32") -> Iterator[Model]:
    """Export a checkpoint with its matrices in float32, and load it with the table in memory."""
    with tempfile.TemporaryDirectory(prefix="paper-") as scratch:
        out = Path(scratch, "artifact")
        export_model(checkpoint, out, graph_weights="fp32", table_codec=codec, verify=False)
        with edge_memllm.load(out, device="cpu", reader="ram", threads=threads) as model:
            yield model
