"""``edge-memllm overlay``: small files that change rows of chosen tokens, made and shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.options import add_command, add_json, layer_list

if TYPE_CHECKING:
    from edge_memllm.cli.options import Commands

_DESCRIPTION = """\
An overlay replaces, adds to, scales or blanks the memory rows of chosen tokens in chosen layers,
while the artifact stays as it is: 'edge-memllm run ARTIFACT --overlay FILE' lays it over. It is for
one model, and says so. Each command takes --json. docs/overlays.md says more."""

_EXAMPLES = """\
  edge-memllm overlay edit artifact --token New --like Los --out new.overlay.safetensors
  edge-memllm overlay show new.overlay.safetensors --artifact artifact
  edge-memllm run artifact --overlay new.overlay.safetensors --prompt "She lived in New\""""

_EDIT = """\
Change rows by hand: --like gives tokens the rows of another, --scale multiplies them, --blank
makes them zero. A word is the token with a space before it, where there is one; '#12' is token 12.
Several edits at once come from a TOML file of tables [[edit]] with the keys tokens, layers, scale,
blank, like and strength."""
_EDIT_EXAMPLES = """\
  edge-memllm overlay edit artifact --token New --like Los --out new.overlay.safetensors
  edge-memllm overlay edit artifact --token war --scale 0.3 --layers 3-5 --out w.overlay.safetensors
  edge-memllm overlay edit artifact --edits edits.toml --out edits.overlay.safetensors"""

_GRAFT = """\
Take the rows of chosen tokens from another model of the same shape and tokenizer: an export of a
checkpoint that was trained on, or by other means, with the rest of both alike enough for it to make
sense; that is not checked."""
_GRAFT_EXAMPLES = """\
  edge-memllm overlay graft artifact other --token Paris London --out cities.overlay.safetensors
  edge-memllm overlay graft artifact other --layers 4,5 --out top.overlay.safetensors"""

_DIFFERENCE = """\
Store what training changed: the rows of CHANGED that differ from those of BASE. Both are artifacts,
or both checkpoints (which needs the export extra and gives an overlay for exports of BASE). All
else must be equal, as after training FFN-M, or trained rows, alone; what is not is named."""
_DIFFERENCE_EXAMPLES = """\
  edge-memllm overlay difference checkpoint finetuned --out finetuned.overlay.safetensors
  edge-memllm overlay difference artifact artifact2 --tolerance 0.01 --out d.overlay.safetensors"""

_SHOW = "Check an overlay and list what it does; words are shown with --artifact."
_SHOW_EXAMPLES = """\
  edge-memllm overlay show new.overlay.safetensors
  edge-memllm overlay show new.overlay.safetensors --artifact artifact --json"""


def add_parser(commands: Commands) -> None:
    """Register the command and those below it."""
    parser = add_command(
        commands,
        "overlay",
        None,
        summary="change rows of chosen tokens on top of an artifact",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_edit(below)
    _add_graft(below)
    _add_difference(below)
    _add_show(below)


def _add_edit(commands: Commands) -> None:
    parser = add_command(
        commands,
        "edit",
        _edit,
        summary="change rows by hand",
        description=_EDIT,
        examples=_EDIT_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    _add_places(parser)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--like", metavar="WORD", help="give the tokens the rows of this one")
    way.add_argument("--scale", type=float, metavar="X", help="multiply the rows")
    way.add_argument("--blank", action="store_true", help="make the rows zero")
    parser.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="with --like: how far to go from the token's own rows, 0 to 1 or beyond (default: 1)",
    )
    parser.add_argument(
        "--edits", type=Path, metavar="FILE", help="several edits, from a TOML file"
    )
    _add_output(parser, "that of the rows the graph is fed")


def _add_graft(commands: Commands) -> None:
    parser = add_command(
        commands,
        "graft",
        _graft,
        summary="take rows from another model",
        description=_GRAFT,
        examples=_GRAFT_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="the model to change")
    parser.add_argument("other", type=Path, metavar="OTHER", help="the artifact with the rows")
    _add_places(parser)
    _add_output(parser, "that of the other's rows as a graph is fed them")


def _add_difference(commands: Commands) -> None:
    parser = add_command(
        commands,
        "difference",
        _difference,
        summary="store the rows that training changed",
        description=_DIFFERENCE,
        examples=_DIFFERENCE_EXAMPLES,
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="an artifact or a checkpoint")
    parser.add_argument("changed", type=Path, metavar="CHANGED", help="another of the same kind")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="leave out rows that differ by at most this share of their norm (default: 0)",
    )
    _add_output(parser, "for artifacts that of CHANGED's rows as a graph is fed them, else f16")


def _add_show(commands: Commands) -> None:
    parser = add_command(
        commands,
        "show",
        _show,
        summary="check an overlay and list what it does",
        description=_SHOW,
        examples=_SHOW_EXAMPLES,
    )
    parser.add_argument("overlay", type=Path, metavar="FILE", help="an overlay")
    parser.add_argument(
        "--artifact",
        type=Path,
        metavar="ARTIFACT",
        help="the model it is for: checks that it fits, and shows tokens as words",
    )
    add_json(parser)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token",
        action="extend",
        nargs="+",
        metavar="WORD",
        help="the tokens whose rows to change",
    )
    parser.add_argument(
        "--layers",
        action="extend",
        type=layer_list,
        metavar="LIST",
        help="only in these layers, such as 0,3-5 (default: all)",
    )


def _add_output(parser: argparse.ArgumentParser, default_codec: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="a name that ends in .overlay.safetensors",
    )
    parser.add_argument("--name", metavar="NAME", help="what to call it (default: as the file)")
    parser.add_argument(
        "--description", default="", metavar="TEXT", help="a line or two for whoever gets it"
    )
    parser.add_argument(
        "--codec",
        metavar="CODEC",
        help=f"how rows are stored: f32, f16, int8-g64, int4-g32 ... (default: {default_codec})",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    add_json(parser)


def _edit(arguments: argparse.Namespace) -> int:
    from edge_memllm.cli.overlay_making import edit

    return edit(arguments)


def _graft(arguments: argparse.Namespace) -> int:
    from edge_memllm.cli.overlay_making import graft

    return graft(arguments)


def _difference(arguments: argparse.Namespace) -> int:
    from edge_memllm.cli.overlay_making import difference

    return difference(arguments)


def _show(arguments: argparse.Namespace) -> int:
    from edge_memllm.cli.overlay_page import show

    return show(arguments)


def _tolerance(text: str) -> float:
    """An argparse type: a share that may be zero."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value
