"""All runs of one length, one after the other; what is finished is left, what was stopped goes on.

Hours of one core: it is made to be started in the background, and stopped at any time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper import one_budget
from benchmarks.paper.judging import TEXTS, TRAINED
from benchmarks.paper.layout import VARIANTS
from benchmarks.paper.quality import LONGER_KIND

_RECIPES = Path("examples") / "recipes"


@dataclass(frozen=True)
class Length:
    """How long runs are; those of the recipes have no steps of their own, and no kind.

    ``narrow`` runs are those of `one_budget`.
    """

    steps: int | None = None
    warm_up: int = 100
    narrow: bool = False

    @property
    def kind(self) -> str:
        """What follows the names of such runs."""
        if self.narrow:
            return one_budget.KIND
        return "" if self.steps is None else LONGER_KIND

    @property
    def variants(self) -> Sequence[str]:
        """The models that are trained so."""
        return one_budget.ORDER if self.narrow else tuple(VARIANTS)

    def settings(self, variant: str) -> list[str]:
        """What the command line says of it."""
        if self.narrow:
            return one_budget.settings(variant)
        if self.steps is None:
            return []
        return [f"training.steps={self.steps}", f"training.warmup_steps={self.warm_up}"]


def train_runs(
    runs: Path,
    data: Path,
    length: Length,
    seeds: Sequence[int] = (1,),
    variants: Sequence[str] | None = None,
) -> Iterator[str]:
    """Train every model that is not finished in the folder ``runs``; a line for each.

    Raises:
        subprocess.CalledProcessError: A training ended with an error, which it has shown.
    """
    for seed in seeds:
        for variant in variants or length.variants:
            out = runs / f"{variant}{length.kind}-s{seed}"
            if (out / "model.safetensors").exists():
                yield f"{out.name}: finished"
                continue
            command = training_words(variant, seed, out, data, length)
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            yield f"{out.name}: trained"


def training_words(variant: str, seed: int, out: Path, data: Path, length: Length) -> list[str]:
    """The command of one training; it goes on where there are checkpoints."""
    texts = [data / TEXTS[name] for name in TRAINED]
    learned = [text.with_name("train.txt") for text in texts]
    settings = [
        f"training.seed={seed}",
        f'data.cache="{out.parent / "token-cache"}"',
        *length.settings(variant),
    ]
    words = [sys.executable, "-m", "edge_memllm.cli.main", "train", _RECIPES / f"{variant}.toml"]
    words += ["--out", out, "--data", *learned, "--valid", *texts]
    words += [word for setting in settings for word in ("--set", setting)]
    if any(out.glob("checkpoints/checkpoint-*")):
        words.append("--resume")
    return [str(word) for word in words]
