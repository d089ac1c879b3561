"""``edge-memllm train``: a recipe and text in, a checkpoint out."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_overrides,
    add_texts,
    apply_options,
    positive_int,
)
from edge_memllm.cli.output import number, write_json
from edge_memllm.errors import RecipeError, missing_extra

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm.modeling.recipe import Recipe

_DESCRIPTION = """\
Train a network of the family from text files (.txt) or JSON lines (.jsonl): a byte-level BPE
tokenizer is trained on them, the documents are packed into sequences, and the network is trained
with Hugging Face's Trainer. A recipe is a TOML file; the options below replace its values."""

_EXAMPLES = """\
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint
  edge-memllm train examples/recipes/tiny-english.toml --data wiki.txt novels.txt --out checkpoint
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint --set training.seed=7
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint --resume
  edge-memllm train --preset 1b --steps 0 --out checkpoint    (random weights, for benchmarks)
  accelerate launch --num_processes 8 -m edge_memllm.cli.main train recipe.toml --out checkpoint"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "train",
        execute,
        summary="train a checkpoint from text",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="a TOML file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint")
    add_texts(parser, "train on")
    parser.add_argument("--preset", metavar="P", help="micro, tiny, small, 250m, 750m or 1b")
    parser.add_argument("--beta", type=int, metavar="N", help="0 MemoryLLM, 1-3 Flex, 8 dense")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="optimiser steps; 0 writes the initial network"
    )
    parser.add_argument("--vocab-size", type=positive_int, metavar="N", help="tokens to learn")
    add_overrides(parser, "--out")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from edge_memllm.modeling.recipe import Recipe
        from edge_memllm.modeling.training import is_main_process, train
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "train") from error
    recipe = _recipe(arguments, Recipe)
    record = train(recipe, arguments.out, resume=arguments.resume)
    if is_main_process():
        print_record(arguments.out, record, as_json=arguments.json)
    return 0


def print_record(out: Path, record: dict[str, Any], *, as_json: bool) -> None:
    """Print where a trained checkpoint is and what was reached."""
    summary = {"checkpoint": str(out), **_summary(record)}
    if as_json:
        write_json(summary)
    else:
        print("\n".join(f"{key.replace('_', ' ')}: {_shown(v)}" for key, v in summary.items()))


def _recipe(arguments: argparse.Namespace, recipe_class: type[Recipe]) -> Recipe:
    if arguments.recipe is None and arguments.preset is None:
        raise RecipeError("Nothing says what to train. Give a RECIPE file or --preset.")
    recipe = recipe_class.load(arguments.recipe) if arguments.recipe else recipe_class()
    model = {"preset": arguments.preset, "beta": arguments.beta}
    if arguments.vocab_size is not None and not (arguments.data or recipe.data.train):
        model["vocab_size"] = arguments.vocab_size
    tokenizer = {"vocab_size": arguments.vocab_size}
    apply_options(recipe, arguments, {"model": model, "tokenizer": tokenizer})
    return recipe


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    kept = ("parameters", "tokens_seen", "training_tokens", "device", "precision", "valid_loss")
    summary = {key: record[key] for key in kept if key in record}
    if "valid_loss" in summary:
        summary["valid_perplexity"] = math.exp(summary["valid_loss"])
    return summary


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return number(value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
