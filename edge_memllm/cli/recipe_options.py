"""What `train` and `convert` share: options that say or change what is in a recipe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_memllm.modeling.recipe import Recipe

Sections = dict[str, dict[str, Any]]


def add_texts(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --data, whose text is there for `purpose`, and --valid."""
    parser.add_argument(
        "--data", action="extend", nargs="+", metavar="FILE", help=f"text or .jsonl to {purpose}"
    )
    parser.add_argument(
        "--valid", action="extend", nargs="+", metavar="FILE", help="text or .jsonl to evaluate on"
    )


def add_overrides(parser: argparse.ArgumentParser, out: str) -> None:
    """Add --seed, --set and --resume; `out` is what the command calls its folder."""
    parser.add_argument("--seed", type=int, metavar="N", help="of weights and data order")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="replace one value of the recipe; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"continue from the newest checkpoint under {out}"
    )


def apply_options(recipe: Recipe, arguments: argparse.Namespace, given: Sections) -> None:
    """Put the options that were given into the recipe, those of --set last.

    `given` holds, by section and key, what a command has besides the shared options; None is for
    options that were not given.
    """
    shared: Sections = {
        "data": {"train": arguments.data, "valid": arguments.valid},
        "training": {"steps": arguments.steps, "seed": arguments.seed},
    }
    for section, values in {**given, **shared}.items():
        named = {key: value for key, value in values.items() if value is not None}
        recipe.update(section, named, where="command line")
    for assignment in arguments.set:
        recipe.override(assignment)
