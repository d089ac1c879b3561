"""``edge-memllm convert``: a dense checkpoint of another family in, one of ours out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_overrides,
    add_texts,
    apply_options,
    positive_int,
)
from edge_memllm.cli.output import StageBars
from edge_memllm.cli.train import print_record
from edge_memllm.errors import missing_extra

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands
    from edge_memllm.modeling.recipe import ConversionRecipe

_DESCRIPTION = """\
Turn a dense checkpoint of the Llama, Mistral, Qwen2 or Qwen3 family (SmolLM is Llama's), or a
dense one of our own (beta 8), into a student with memory: its attention and embeddings are copied,
its feed-forward networks are split into a few neurons and rows that depend on the token, fitted to
a text, and the student is then trained to compute what the dense network computes. The checkpoint
is exported like any other."""

_EXAMPLES = """\
  edge-memllm convert smollm student --data corpus.txt --steps 2000
  edge-memllm convert smollm student --beta 0 --data corpus.txt --valid valid.txt --steps 2000
  edge-memllm convert smollm student --data corpus.txt --steps 2000 --resume
  edge-memllm convert smollm student --data corpus.txt --steps 0      (fitted, not trained)
  edge-memllm convert smollm student --data corpus.txt --set training.learning_rate=1e-4"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "convert",
        execute,
        summary="make a MemoryLLM of a dense checkpoint",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("dense", type=Path, metavar="DENSE", help="the dense checkpoint's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the student's checkpoint")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="a TOML file with any of the settings"
    )
    add_texts(parser, "learn from")
    parser.add_argument("--beta", type=int, metavar="N", help="0 MemoryLLM, 1-3 Flex (default: 3)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="optimiser steps; 0 only fits (default: 1000)"
    )
    parser.add_argument(
        "--layers-per-stage",
        type=positive_int,
        metavar="N",
        help="let so many layers at a time take over from the dense ones (default: all at once)",
    )
    add_overrides(parser, "OUT")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from edge_memllm.modeling.conversion import convert
        from edge_memllm.modeling.recipe import ConversionRecipe
        from edge_memllm.modeling.training import is_main_process
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "train") from error
    recipe = _recipe(arguments, ConversionRecipe)
    with StageBars() as bars:
        record = convert(arguments.dense, arguments.out, recipe, arguments.resume, bars)
    if is_main_process():
        print_record(arguments.out, record, as_json=arguments.json)
    return 0


def _recipe(
    arguments: argparse.Namespace, recipe_class: type[ConversionRecipe]
) -> ConversionRecipe:
    recipe = recipe_class.load(arguments.recipe) if arguments.recipe else recipe_class()
    stages = {"layers_per_stage": arguments.layers_per_stage}
    apply_options(recipe, arguments, {"model": {"beta": arguments.beta}, "conversion": stages})
    return recipe
