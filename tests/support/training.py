"""A text and recipes of trainings that take seconds."""

from __future__ import annotations

from typing import Any

from edge_memllm.modeling.recipe import Recipe

SENTENCES = [
    f"= title {i} =\nThe cat number {i} sat on the mat and saw {i * 7}.\n" for i in range(200)
]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def recipe_for(text: str, **training: Any) -> Recipe:
    recipe = Recipe()
    recipe.update("model", {"preset": "tiny", **TINY}, where="test")
    recipe.update("tokenizer", {"vocab_size": 400}, where="test")
    data = {"train": [text], "valid": [text], "sequence_length": 32, "document_start": "^= .+ =$"}
    recipe.update("data", data, where="test")
    defaults = {"steps": 6, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "save_every": 2}
    recipe.update("training", {**defaults, **training}, where="test")
    return recipe
