"""A recipe with the settings of a conversion; how to train is said as in any other recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import DENSE_BETA
from edge_memllm.modeling.recipe import Recipe, TokenizerRecipe

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
    """A recipe whose ``[model]`` holds what the student chooses: ``STUDENT_FIELDS``."""

    model: dict[str, Any] = field(default_factory=lambda: {"beta": 3})
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
