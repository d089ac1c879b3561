"""``edge-memllm train`` and ``convert``: a checkpoint of text, and one of a dense checkpoint.

Both work by a recipe, a TOML file whose values the options replace.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import StageBars, number, write_json
from edge_memllm.errors import RecipeError, missing_extra
from edge_memllm.options import Group, Option, positive_int

if TYPE_CHECKING:
    from edge_memllm.modeling.recipe import ConversionRecipe, Recipe

_TRAIN = """\
Train a network of the family from text files (.txt) or JSON lines (.jsonl): a byte-level BPE
tokenizer is trained on them, the documents are packed into sequences, and the network is trained
with Hugging Face's Trainer. A recipe is a TOML file; the options below replace its values."""

_TRAIN_EXAMPLES = """\
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint
  edge-memllm train examples/recipes/tiny-english.toml --data wiki.txt novels.txt --out checkpoint
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint --set training.seed=7
  edge-memllm train --preset tiny --data corpus.txt --out checkpoint --resume
  edge-memllm train --preset 1b --steps 0 --out checkpoint    (random weights, for benchmarks)
  accelerate launch --num_processes 8 -m edge_memllm.cli.main train recipe.toml --out checkpoint"""

_CONVERT = """\
Turn a dense checkpoint of the Llama, Mistral, Qwen2 or Qwen3 family (SmolLM is Llama's), or a
dense one of our own (beta 8), into a student with memory: its attention and embeddings are copied,
its feed-forward networks are split into a few neurons and rows that depend on the token, fitted to
a text, and the student is then trained to compute what the dense network computes. The checkpoint
is exported like any other."""

_CONVERT_EXAMPLES = """\
  edge-memllm convert smollm student --data corpus.txt --steps 2000
  edge-memllm convert smollm student --beta 0 --data corpus.txt --valid valid.txt --steps 2000
  edge-memllm convert smollm student --data corpus.txt --steps 2000 --resume
  edge-memllm convert smollm student --data corpus.txt --steps 0      (fitted, not trained)
  edge-memllm convert smollm student --data corpus.txt --set training.learning_rate=1e-4"""

Sections = dict[str, dict[str, Any]]
Preset = Annotated[str | None, Option("micro, tiny, small, 250m, 750m or 1b", metavar="P")]
_Texts = tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Values of a recipe that both commands replace, and how they go on."""

    data: Annotated[
        _Texts, Option("text or .jsonl to learn from", "FILE", parse=str, several="words")
    ] = None
    valid: Annotated[
        _Texts, Option("text or .jsonl to evaluate on", "FILE", parse=str, several="words")
    ] = None
    seed: Annotated[int | None, Option("of weights and data order")] = None
    set: Annotated[
        tuple[str, ...],
        Option(
            "replace one value of the recipe; may be repeated",
            "SECTION.KEY=VALUE",
            parse=str,
            several="repeated",
        ),
    ] = ()
    resume: Annotated[bool, Option("continue from the newest checkpoint in the folder to make")] = (
        False
    )


@dataclass(frozen=True)
class TrainOptions:
    """What may be asked of ``edge-memllm train``."""

    recipe: Annotated[Path | None, Option("a TOML file")] = None
    _: KW_ONLY
    out: Annotated[Path, Option("the checkpoint", metavar="DIR")]
    preset: Preset = None
    beta: Annotated[int | None, Option("0 MemoryLLM, 1-3 Flex, 8 dense")] = None
    steps: Annotated[int | None, Option("optimiser steps; 0 writes the initial network")] = None
    vocab_size: Annotated[int | None, Option("tokens to learn", parse=positive_int)] = None
    values: Annotated[RecipeOptions, Group()]
    json: Json = False


@dataclass(frozen=True)
class ConvertOptions:
    """What may be asked of ``edge-memllm convert``; the defaults are the recipe's."""

    dense: Annotated[Path, Option("the dense checkpoint's folder")]
    out: Annotated[Path, Option("the student's checkpoint")]
    _: KW_ONLY
    recipe: Annotated[Path | None, Option("a TOML file with any of the settings")] = None
    beta: Annotated[int | None, Option("0 MemoryLLM, 1-3 Flex", unset="3")] = None
    steps: Annotated[int | None, Option("optimiser steps; 0 only fits", unset="1000")] = None
    layers_per_stage: Annotated[
        int | None,
        Option(
            "let so many layers at a time take over from the dense ones",
            parse=positive_int,
            unset="all at once",
        ),
    ] = None
    values: Annotated[RecipeOptions, Group()]
    json: Json = False


def train(options: TrainOptions) -> int:
    """Run ``edge-memllm train``."""
    try:
        from edge_memllm.modeling.recipe import Recipe
        from edge_memllm.modeling.training import is_main_process, train
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "train") from error
    record = train(_training(options, Recipe), options.out, resume=options.values.resume)
    if is_main_process():
        _print_record(options.out, record, as_json=options.json)
    return 0


def convert(options: ConvertOptions) -> int:
    """Run ``edge-memllm convert``."""
    try:
        from edge_memllm.modeling.conversion import convert
        from edge_memllm.modeling.recipe import ConversionRecipe
        from edge_memllm.modeling.training import is_main_process
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "train") from error
    recipe = _conversion(options, ConversionRecipe)
    with StageBars() as bars:
        record = convert(options.dense, options.out, recipe, options.values.resume, bars)
    if is_main_process():
        _print_record(options.out, record, as_json=options.json)
    return 0


def _training(options: TrainOptions, recipe_class: type[Recipe]) -> Recipe:
    if options.recipe is None and options.preset is None:
        raise RecipeError("Nothing says what to train. Give a RECIPE file or --preset.")
    recipe = recipe_class.load(options.recipe) if options.recipe else recipe_class()
    model = {"preset": options.preset, "beta": options.beta}
    if options.vocab_size is not None and not (options.values.data or recipe.data.train):
        model["vocab_size"] = options.vocab_size
    tokenizer = {"vocab_size": options.vocab_size}
    _replace(recipe, options, {"model": model, "tokenizer": tokenizer})
    return recipe


def _conversion(options: ConvertOptions, recipe_class: type[ConversionRecipe]) -> ConversionRecipe:
    recipe = recipe_class.load(options.recipe) if options.recipe else recipe_class()
    stages = {"layers_per_stage": options.layers_per_stage}
    _replace(recipe, options, {"model": {"beta": options.beta}, "conversion": stages})
    return recipe


def _replace(recipe: Recipe, options: TrainOptions | ConvertOptions, own: Sections) -> None:
    """Put what was given into the recipe, that of --set last; `own` is of one command alone."""
    given = options.values
    shared: Sections = {
        "data": {"train": _list(given.data), "valid": _list(given.valid)},
        "training": {"steps": options.steps, "seed": given.seed},
    }
    for section, values in {**own, **shared}.items():
        named = {key: value for key, value in values.items() if value is not None}
        recipe.update(section, named, where="command line")
    for assignment in given.set:
        recipe.override(assignment)


def _list(files: _Texts) -> list[str] | None:
    return None if files is None else list(files)


def _print_record(out: Path, record: dict[str, Any], *, as_json: bool) -> None:
    """Print where a trained checkpoint is and what was reached."""
    summary = {"checkpoint": str(out), **_summary(record)}
    if as_json:
        write_json(summary)
    else:
        print("\n".join(f"{key.replace('_', ' ')}: {_shown(v)}" for key, v in summary.items()))


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


def interrupted(options: TrainOptions | ConvertOptions) -> str:
    """Say what Ctrl-C leaves of a training."""
    saved = next(options.out.glob("*/checkpoint-*"), None)
    if saved is None:
        return f"Stopped before a first checkpoint: nothing of it is kept in {options.out}."
    return (
        f"Stopped: checkpoints are in {saved.parent}. The same command with --resume goes on from "
        "the newest."
    )


TRAIN = Command(TrainOptions, train, _TRAIN, _TRAIN_EXAMPLES, interrupted)
CONVERT = Command(ConvertOptions, convert, _CONVERT, _CONVERT_EXAMPLES, interrupted)
