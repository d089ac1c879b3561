"""A training recipe: what to train, on what, and how, read strictly from TOML.

Knows nothing of torch. Every key has one meaning and a wrong one is an error that names it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from edge_memllm.checked_values import is_integer
from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import DENSE_BETA

PRECISIONS = ("auto", "bf16", "fp32")
SAVE_DTYPES = ("float32", "float16", "bfloat16")

# What a student may choose for itself; the rest of its shape is the dense network's.
STUDENT_FIELDS = (
    "beta",
    "intermediate_size",
    "memory_intermediate_size",
    "memory_norm",
    "memory_source",
)

WEIGHTS = ("kl_weight", "hidden_weight", "label_weight")


@dataclass
class TokenizerRecipe:
    """A byte-level BPE tokenizer trained on the data, or a ready one (``path``)."""

    vocab_size: int = 8192
    path: str | None = None


@dataclass
class DataRecipe:
    """Text files (one document each, or split at lines matching ``document_start``) or .jsonl.

    ``text_field`` names the field of a JSON line that holds its document. ``cache`` is a folder
    where tokens, and a tokenizer trained on the data, are kept for other runs on the same text.
    With ``boundary_first`` each sequence begins with the token that begins a document, wherever in
    one it is cut from.
    """

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    document_start: str | None = None
    text_field: str = "text"
    sequence_length: int = 512
    cache: str | None = None
    boundary_first: bool = False


@dataclass
class TrainingRecipe:
    """AdamW, cosine with warm-up, z-loss: the paper's Table 3 but for the learning rate.

    ``batch_size`` counts sequences per device and step; ``min_learning_rate`` is where the
    cosine ends. ``precision`` "auto" is bf16 autocast.
    """

    steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    z_loss: float = 1e-6
    max_grad_norm: float = 1.0
    precision: str = "auto"
    save_dtype: str = "float32"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 250


@dataclass
class Recipe:
    """All of a training run.

    ``model`` holds a preset name and fields of MemoryLLMConfig; ``trainer`` extra fields of
    ``transformers.TrainingArguments`` (``fsdp``, ``dataloader_num_workers``, ...).
    """

    model: dict[str, Any] = field(default_factory=lambda: {"preset": "tiny"})
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    trainer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file; relative data paths count from the working directory.

        A first line ``include = "other.toml"`` names a recipe in the same folder, whose values
        hold where this one says nothing. That one may not include another.
        """
        document = _parse(path)
        recipe = cls()
        included = document.pop("include", None)
        if included is not None:
            recipe._update_all(_parse(_beside(path, included)), path.parent / included)
        recipe._update_all(document, path)
        return recipe

    def _update_all(self, document: dict[str, Any], path: Path) -> None:
        for section, values in document.items():
            self.update(section, values, where=str(path))

    def update(self, section: str, values: Any, where: str) -> None:
        """Replace the given keys of one section; unknown names and wrong types are errors."""
        names = [item.name for item in dataclasses.fields(self)]
        if section not in names or not isinstance(values, dict):
            raise RecipeError(
                f"{where}: unknown section [{section}]; a recipe has {', '.join(names)}."
            )
        target = getattr(self, section)
        for key, value in values.items():
            if isinstance(target, dict):
                target[key] = value
            else:
                _assign(target, key, value, where=f"{where}: [{section}]")

    def override(self, assignment: str) -> None:
        """Apply one ``section.key=value`` of the command line; the value is written as TOML."""
        name, found, text = assignment.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (found and dot and key):
            raise RecipeError(f"--set {assignment}: expected section.key=value.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()
        self.update(section, {key: value}, where=f"--set {assignment}")

    def validate(self) -> None:
        """Refuse values that no run could use."""
        training, data = self.training, self.data
        for key in ("batch_size", "gradient_accumulation_steps", "log_every", "eval_every"):
            if getattr(training, key) < 1:
                raise RecipeError(f"[training] {key} is {getattr(training, key)}; use 1 or more.")
        if training.steps < 0:
            raise RecipeError(f"[training] steps is {training.steps}; use 0 or more.")
        if training.precision not in PRECISIONS:
            raise RecipeError(
                f"[training] precision is {training.precision!r}; "
                f"use one of {', '.join(PRECISIONS)}."
            )
        if training.save_dtype not in SAVE_DTYPES:
            raise RecipeError(
                f"[training] save_dtype is {training.save_dtype!r}; "
                f"use one of {', '.join(SAVE_DTYPES)}."
            )
        if training.min_learning_rate > training.learning_rate:
            raise RecipeError(
                f"[training] min_learning_rate ({training.min_learning_rate}) is above "
                f"learning_rate ({training.learning_rate})."
            )
        if data.sequence_length < 2:
            raise RecipeError(f"[data] sequence_length is {data.sequence_length}; use 2 or more.")
        if training.steps and not data.train:
            raise RecipeError("[data] train is empty; name at least one text or .jsonl file.")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the record kept beside the trained weights."""
        return dataclasses.asdict(self)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not a TOML file ({error}).") from error


def _beside(path: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise RecipeError(f"{path}: include is {name!r}; expected the name of a file beside it.")
    return path.parent / name


def _assign(target: Any, key: str, value: Any, where: str) -> None:
    fields = {item.name: item.type for item in dataclasses.fields(target)}
    if key not in fields:
        raise RecipeError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}.")
    kind = str(fields[key])
    if kind == "float" and is_integer(value):
        value = float(value)
    if not _fits(value, kind):
        raise RecipeError(f"{where}: {key} is {value!r}; expected {kind}.")
    setattr(target, key, value)


def _fits(value: Any, kind: str) -> bool:
    """Whether a TOML value has the annotated type (the few forms that recipes use)."""
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    types = {"int": int, "float": float, "str": str, "str | None": str}
    return isinstance(value, types[kind])


@dataclass
class DistillationRecipe:
    """How the student is fitted and what it is trained to.

    ``fit_tokens`` of the text make the first weights. The loss is ``kl_weight`` times the KL
    divergence from the dense network's predictions plus ``hidden_weight`` times the squared
    distance of the hidden states, as a share of their square, the mean of all layers, plus
    ``label_weight`` times the next-token loss, by which a student can surpass its teacher. With
    ``layers_per_stage`` the student's layers take over from the dense ones so many at a time, in
    the first half of the steps; 0 trains all of them from the start.
    """

    fit_tokens: int = 1 << 18
    kl_weight: float = 1.0
    hidden_weight: float = 1.0
    label_weight: float = 0.0
    layers_per_stage: int = 0


@dataclass
class ConversionRecipe(Recipe):
    """A recipe whose ``[model]`` holds what the student chooses: ``STUDENT_FIELDS``.

    Most weights come trained, so steps are smaller than from scratch and nothing decays; and
    trained networks do something of their own at the first position, whatever is there, so
    sequences begin with the token that is meant to be.
    """

    model: dict[str, Any] = field(default_factory=lambda: {"beta": 3})
    data: DataRecipe = field(default_factory=lambda: DataRecipe(boundary_first=True))
    training: TrainingRecipe = field(
        default_factory=lambda: TrainingRecipe(
            learning_rate=3e-4, min_learning_rate=3e-5, weight_decay=0.0
        )
    )
    conversion: DistillationRecipe = field(default_factory=DistillationRecipe)

    @property
    def reads_text(self) -> bool:
        """Whether there is something to fit or to train; a dense student is a copy."""
        return self.training.steps > 0 or self.model["beta"] != DENSE_BETA

    def validate(self) -> None:
        """Refuse values that no conversion could use."""
        super().validate()
        if self.reads_text and not self.data.train:
            raise RecipeError("[data] train is empty; a student is fitted to what a text needs.")
        for key in self.model:
            if key not in STUDENT_FIELDS:
                raise RecipeError(
                    f"[model] {key}: a student chooses {', '.join(STUDENT_FIELDS)}; all else is "
                    "the dense network's."
                )
        if self.tokenizer != TokenizerRecipe():
            raise RecipeError("[tokenizer] is for training; a student keeps the dense network's.")
        conversion = self.conversion
        if self.reads_text and conversion.fit_tokens < self.data.sequence_length:
            raise RecipeError(
                f"[conversion] fit_tokens is {conversion.fit_tokens}, less than one sequence of "
                f"{self.data.sequence_length}."
            )
        for key in (*WEIGHTS, "layers_per_stage"):
            if getattr(conversion, key) < 0:
                raise RecipeError(
                    f"[conversion] {key} is {getattr(conversion, key)}; use 0 or more."
                )
        if not any(getattr(conversion, key) for key in WEIGHTS):
            raise RecipeError(f"[conversion] {', '.join(WEIGHTS)} are all 0: nothing to learn.")
