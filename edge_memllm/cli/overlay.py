"""``edge-memllm overlay``: small files that change rows of chosen tokens, made and shown."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import MANIFEST_NAME, Manifest
from edge_memllm.cli.options import add_command, add_json, layer_list
from edge_memllm.cli.output import StageBars, byte_count, number, table, write_json
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.hub import artifact_folder
from edge_memllm.interpretation.tokens import TokenTexts
from edge_memllm.overlays import SUFFIX, Overlay, OverlaySpec, Written, open_overlay, write_overlay
from edge_memllm.overlays.making import (
    Alteration,
    Difference,
    check_same_but_rows,
    check_same_shape,
    checked_layers,
    edits_of,
    read_edits,
    write_difference,
    write_graft,
)
from edge_memllm.overlays.table import plain_codec
from edge_memllm.table.table import Table
from edge_memllm.text.tokenization import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

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

Text = Callable[[int], str]

_MOST_TOKENS = 40  # shown; --json has all

_ARTIFACT, _CHECKPOINT = "an artifact", "a checkpoint"


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

    return edit(arguments)


def _graft(arguments: argparse.Namespace) -> int:

    return graft(arguments)


def _difference(arguments: argparse.Namespace) -> int:

    return difference(arguments)


def _show(arguments: argparse.Namespace) -> int:

    return show(arguments)


def _tolerance(text: str) -> float:
    """An argparse type: a share that may be zero."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


def tell_written(written: Written, as_json: bool) -> None:
    """Say what was written."""
    if as_json:
        write_json(_written(written))
    else:
        print(table(_rows(written)))


def tell_difference(found: Difference, as_json: bool) -> None:
    """Say what was written, and how much differed."""
    if as_json:
        write_json({**_written(found.written), "compared": found.compared})
        return
    share = found.written.entries / found.compared
    compared = f"{number(found.written.entries)} of {number(found.compared)} rows ({share:.2%})"
    print(table([*_rows(found.written), ("differing", compared)]))


def show(arguments: argparse.Namespace) -> int:
    """Run ``overlay show``."""
    overlay = open_overlay(arguments.overlay)
    text: Text | None = None
    if arguments.artifact is not None:
        with Artifact.open(artifact_folder(arguments.artifact)) as artifact:
            overlay.check_fits(artifact.manifest)
            text = token_texts(artifact).text
    if arguments.json:
        write_json(as_dict(overlay, text))
    else:
        print(page(overlay, text))
    return 0


def token_texts(artifact: Artifact) -> TokenTexts:
    """Return what makes tokens of words, and words of tokens."""
    return TokenTexts(Tokenizer.from_artifact(artifact), artifact.manifest.model.vocab_size)


def as_dict(overlay: Overlay, text: Text | None) -> dict[str, Any]:
    """An overlay as a dict for JSON; without the numbers of its rows, of which it has the norms."""
    return {
        **_spec(overlay.spec),
        "entries": len(overlay),
        "rows": len(overlay.rows),
        "edits": [
            {
                "token": edit.token,
                "text": None if text is None else text(edit.token),
                "layer": edit.layer,
                "operation": edit.operation,
                "factor": edit.factor if edit.operation == "scale" else None,
                "norm": None if edit.row is None else float((edit.row**2).sum() ** 0.5),
            }
            for edit in overlay.edits()
        ],
    }


def page(overlay: Overlay, text: Text | None) -> str:
    """An overlay as people read it: tokens with equal operations in one line."""
    spec = overlay.spec
    tokens = np.unique(overlay.entries.tokens).astype(np.int64)
    rows = [
        ("overlay", spec.name),
        *([("about", spec.description)] if spec.description else []),
        ("model", spec.identity),
        ("shape", f"{spec.layers} memory rows of {spec.width} values"),
        ("stored", f"{_count(len(overlay.rows), 'row')} as {spec.codec}"),
        ("changes", f"{_count(len(overlay), 'row')} of {_count(len(tokens), 'token')}"),
    ]
    lines = [table(rows)]
    if tokens.size:
        lines += ["", table(_listed(overlay, tokens[:_MOST_TOKENS], text))]
    if len(tokens) > _MOST_TOKENS:
        lines.append(f"and {number(len(tokens) - _MOST_TOKENS)} tokens more; --json lists all.")
    return "\n".join(lines)


def _listed(
    overlay: Overlay, tokens: NDArray[np.int64], text: Text | None
) -> list[tuple[str, ...]]:
    def row(token: str, word: str, what: str) -> tuple[str, ...]:
        return (token, what) if text is None else (token, word, what)

    rows = [row("token", "text", "layers: operation")]
    for token, what in _by_token(overlay, tokens).items():
        rows.append(row(f"#{token}", "" if text is None else repr(text(token)), what))
    return rows


def _by_token(overlay: Overlay, tokens: NDArray[np.int64]) -> dict[int, str]:
    """What becomes of each of some tokens: ``0-2,5: replace; 3: scale 0.5``."""
    found: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for edit in overlay.edits(overlay.find(tokens)[0]):
        what = f"scale {edit.factor:g}" if edit.operation == "scale" else edit.operation
        found[edit.token][what].append(edit.layer)
    return {
        token: "; ".join(f"{_ranges(layers)}: {what}" for what, layers in each.items())
        for token, each in found.items()
    }


def _ranges(layers: Iterable[int]) -> str:
    """Ascending numbers, neighbours as ranges: ``0-2,5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)


def _written(written: Written) -> dict[str, Any]:
    counts = {"entries": written.entries, "rows": written.rows, "bytes": written.bytes}
    return {"path": str(written.path), **_spec(written.spec), **counts}


def _rows(written: Written) -> list[tuple[str, str]]:
    return [
        ("overlay", f"{written.path}, {byte_count(written.bytes)}"),
        ("name", written.spec.name),
        ("model", written.spec.identity[:19]),
        ("changes", _count(written.entries, "row")),
        ("stored", f"{_count(written.rows, 'row')} as {written.spec.codec}"),
    ]


def _count(found: int, what: str) -> str:
    return f"{number(found)} {what}{'' if found == 1 else 's'}"


def _spec(spec: OverlaySpec) -> dict[str, Any]:
    return asdict(spec)


def edit(arguments: argparse.Namespace) -> int:
    """Run ``overlay edit``."""
    _check_edit(arguments)
    with ExitStack() as opened:
        artifact, table = _open(arguments.artifact, opened)
        spec = _new_spec(arguments, artifact.manifest, artifact.manifest)
        alterations = _alterations(arguments, token_texts(artifact))
        edits = edits_of(alterations, table)
        written = write_overlay(arguments.out, spec, edits, overwrite=arguments.force)
    tell_written(written, arguments.json)
    return 0


def graft(arguments: argparse.Namespace) -> int:
    """Run ``overlay graft``."""
    with ExitStack() as opened:
        artifact, _ = _open(arguments.artifact, opened)
        other, donor = _open(arguments.other, opened)
        check_same_shape(artifact, other)
        spec = _new_spec(arguments, artifact.manifest, other.manifest)
        tokens: Sequence[int] = range(artifact.manifest.model.vocab_size)
        if arguments.token is not None:
            tokens = [token_texts(artifact).find(word) for word in arguments.token]
        written = write_graft(
            arguments.out,
            spec,
            donor,
            tokens,
            checked_layers(arguments.layers and tuple(arguments.layers), spec.layers),
            overwrite=arguments.force,
            progress=opened.enter_context(StageBars()),
        )
    tell_written(written, arguments.json)
    return 0


def difference(arguments: argparse.Namespace) -> int:
    """Run ``overlay difference``."""
    kinds = [_kind(path) for path in (arguments.base, arguments.changed)]
    if kinds[0] != kinds[1]:
        raise RequestError(
            f"{arguments.base} is {kinds[0]}, {arguments.changed} is {kinds[1]}: expected two of "
            "a kind."
        )
    made = _between_artifacts if kinds[0] == _ARTIFACT else _between_checkpoints
    tell_difference(made(arguments), arguments.json)
    return 0


def _between_artifacts(arguments: argparse.Namespace) -> Difference:
    with ExitStack() as opened:
        base, ours = _open(arguments.base, opened)
        changed, theirs = _open(arguments.changed, opened)
        check_same_but_rows(base, changed, tolerance=arguments.tolerance)
        return write_difference(
            arguments.out,
            _new_spec(arguments, base.manifest, changed.manifest),
            ours,
            theirs,
            base.manifest.model.vocab_size,
            tolerance=arguments.tolerance,
            overwrite=arguments.force,
            progress=opened.enter_context(StageBars()),
        )


def _between_checkpoints(arguments: argparse.Namespace) -> Difference:
    try:
        from edge_memllm_export import checkpoint_difference
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error

    with StageBars() as bars:
        found: Difference = checkpoint_difference(
            arguments.base,
            arguments.changed,
            arguments.out,
            name=_name(arguments),
            description=arguments.description,
            codec=arguments.codec or "f16",
            tolerance=arguments.tolerance,
            overwrite=arguments.force,
            progress=bars,
        )
    return found


def _open(path: Path, opened: ExitStack) -> tuple[Artifact, Table]:
    artifact = opened.enter_context(Artifact.open(artifact_folder(path)))
    return artifact, opened.enter_context(closing(Table.open(artifact, "pread")))


def _new_spec(arguments: argparse.Namespace, base: Manifest, source: Manifest) -> OverlaySpec:
    """Return the spec of an overlay for `base` with rows of `source`."""
    codec = arguments.codec
    if codec is None and base.model.memory_layers:
        codec = plain_codec(source.layout.codec).id
    return OverlaySpec.for_model(
        base, _name(arguments), codec=codec or "f16", description=arguments.description
    )


def _name(arguments: argparse.Namespace) -> str:
    name: str = (
        arguments.out.name.removesuffix(SUFFIX) if arguments.name is None else arguments.name
    )
    return name


def _check_edit(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect, or that nothing can be done with."""
    by_hand = ("token", "layers", "like", "scale", "strength")
    given = [f"--{name}" for name in by_hand if getattr(arguments, name) is not None]
    given += ["--blank"] if arguments.blank else []
    if arguments.edits is not None and given:
        raise RequestError(f"{given[0]} has no effect with --edits: say it in that file.")
    if arguments.edits is None and arguments.token is None:
        raise RequestError("No tokens are named. Give --token WORD, or --edits FILE.")


def _alterations(arguments: argparse.Namespace, texts: TokenTexts) -> list[Alteration]:
    if arguments.edits is not None:
        return read_edits(arguments.edits, texts.find)
    return [
        Alteration(
            tokens=tuple(map(texts.find, arguments.token)),
            layers=arguments.layers and tuple(arguments.layers),
            scale=arguments.scale,
            blank=arguments.blank,
            like=None if arguments.like is None else texts.find(arguments.like),
            strength=arguments.strength,
        )
    ]


def _kind(path: Path) -> str:
    if (path / MANIFEST_NAME).exists():
        return _ARTIFACT
    if (path / "config.json").exists():
        return _CHECKPOINT
    raise RequestError(
        f"{path}: neither an artifact nor a checkpoint, there is no {MANIFEST_NAME} and no "
        "config.json."
    )
