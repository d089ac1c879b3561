"""``edge-memllm overlay``: small files that change rows of chosen tokens, made and shown."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import MANIFEST_NAME, Manifest
from edge_memllm.cli.options import Command, Commands, Json
from edge_memllm.cli.output import StageBars, byte_count, number, table, write_json
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.hub import artifact_folder
from edge_memllm.options import Group, Option, layer_list
from edge_memllm.overlays import SUFFIX, Overlay, OverlaySpec, Written, open_overlay, write_overlay
from edge_memllm.overlays.compatibility import check_same_but_rows, check_same_shape
from edge_memllm.overlays.making import (
    Alteration,
    Difference,
    checked_layers,
    edits_of,
    read_edits,
    write_difference,
    write_graft,
)
from edge_memllm.overlays.table import plain_codec
from edge_memllm.table.table import Table
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Tokenizer

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
makes them zero. Rows of Gemma are gates: docs/overlays.md says what scaled and blank ones do. A
word is the token with a space before it, where there is one; '#12' is token 12.
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


def _tolerance(text: str) -> float:
    """Parse a share that may be zero."""
    value = float(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


# What the commands that write an overlay share.
_Tokens = Annotated[
    tuple[str, ...],
    Option("the tokens whose rows to change", "WORD", parse=str, several="words"),
]
_Layers = Annotated[
    tuple[int, ...] | None,
    Option("only in these layers, such as 0,3-5", parse=layer_list, several="list", unset="all"),
]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The file to write and what it says of itself."""

    out: Annotated[Path, Option("a name that ends in .overlay.safetensors")]
    name: Annotated[str | None, Option("what to call it", "NAME", unset="as the file")] = None
    description: Annotated[str, Option("a line or two for whoever gets it", "TEXT")] = ""
    codec: Annotated[
        str | None, Option("how rows are stored: f32, f16, int8-g64, int4-g32 ...", "CODEC")
    ] = None
    force: Annotated[bool, Option("replace the file if it is there")] = False
    json: Json = False

    @property
    def title(self) -> str:
        """What the overlay is called."""
        return self.out.name.removesuffix(SUFFIX) if self.name is None else self.name

    def spec(self, base: Manifest, source: Manifest) -> OverlaySpec:
        """Return the spec of an overlay for `base` with rows of `source`."""
        codec = self.codec
        if codec is None and base.model.memory.layers:
            codec = plain_codec(source.layout).id
        return OverlaySpec.for_model(
            base, self.title, codec=codec or "f16", description=self.description
        )


@dataclass(frozen=True)
class EditOptions:
    """What may be asked of ``edge-memllm overlay edit``."""

    artifact: Annotated[Path, Option("an exported model")]
    _: KW_ONLY
    token: _Tokens = ()
    layers: _Layers = None
    like: Annotated[
        str | None, Option("give the tokens the rows of this one", "WORD", one_of="way")
    ] = None
    scale: Annotated[float | None, Option("multiply the rows", one_of="way")] = None
    blank: Annotated[bool, Option("make the rows zero", one_of="way")] = False
    strength: Annotated[
        float | None,
        Option("with --like: how far to go from the token's own rows, 0 to 1 or beyond", unset="1"),
    ] = None
    edits: Annotated[Path | None, Option("several edits, from a TOML file")] = None
    output: Annotated[OutputOptions, Group(unset={"codec": "that of the rows the graph is fed"})]

    def check(self) -> None:
        """Refuse options that would have no effect, or that nothing can be done with."""
        by_hand = {
            "--token": self.token or None,
            "--layers": self.layers,
            "--like": self.like,
            "--scale": self.scale,
            "--strength": self.strength,
            "--blank": self.blank or None,
        }
        given = [name for name, value in by_hand.items() if value is not None]
        if self.edits is not None and given:
            raise RequestError(f"{given[0]} has no effect with --edits: say it in that file.")
        if self.edits is None and not self.token:
            raise RequestError("No tokens are named. Give --token WORD, or --edits FILE.")


@dataclass(frozen=True)
class GraftOptions:
    """What may be asked of ``edge-memllm overlay graft``."""

    artifact: Annotated[Path, Option("the model to change")]
    other: Annotated[Path, Option("the artifact with the rows")]
    _: KW_ONLY
    token: _Tokens = ()
    layers: _Layers = None
    output: Annotated[
        OutputOptions, Group(unset={"codec": "that of the other's rows as a graph is fed them"})
    ]


@dataclass(frozen=True)
class DifferenceOptions:
    """What may be asked of ``edge-memllm overlay difference``."""

    base: Annotated[Path, Option("an artifact or a checkpoint")]
    changed: Annotated[Path, Option("another of the same kind")]
    _: KW_ONLY
    tolerance: Annotated[
        float,
        Option(
            "leave out rows that differ by at most this share of their norm",
            metavar="X",
            parse=_tolerance,
        ),
    ] = 0.0
    output: Annotated[
        OutputOptions,
        Group(
            unset={"codec": "for artifacts that of CHANGED's rows as a graph is fed them, else f16"}
        ),
    ]


@dataclass(frozen=True)
class ShowOptions:
    """What may be asked of ``edge-memllm overlay show``."""

    overlay: Annotated[Path, Option("an overlay", metavar="FILE")]
    _: KW_ONLY
    artifact: Annotated[
        Path | None,
        Option(
            "the model it is for: checks that it fits, and shows tokens as words",
            metavar="ARTIFACT",
        ),
    ] = None
    json: Json = False


def edit(options: EditOptions) -> int:
    """Run ``overlay edit``."""
    options.check()
    with ExitStack() as opened:
        artifact, table = _open(options.artifact, opened)
        spec = options.output.spec(artifact.manifest, artifact.manifest)
        alterations = _alterations(options, token_texts(artifact))
        edits = edits_of(alterations, table)
        written = write_overlay(options.output.out, spec, edits, overwrite=options.output.force)
    _tell_written(written, options.output.json)
    return 0


def graft(options: GraftOptions) -> int:
    """Run ``overlay graft``."""
    with ExitStack() as opened:
        artifact, _ = _open(options.artifact, opened)
        other, donor = _open(options.other, opened)
        check_same_shape(artifact, other)
        spec = options.output.spec(artifact.manifest, other.manifest)
        tokens: Sequence[int] = range(artifact.manifest.model.vocab_size)
        if options.token:
            tokens = [token_texts(artifact).find(word) for word in options.token]
        written = write_graft(
            options.output.out,
            spec,
            donor,
            tokens,
            checked_layers(options.layers, spec.layers),
            overwrite=options.output.force,
            progress=opened.enter_context(StageBars()),
        )
    _tell_written(written, options.output.json)
    return 0


def difference(options: DifferenceOptions) -> int:
    """Run ``overlay difference``."""
    kinds = [_kind(path) for path in (options.base, options.changed)]
    if kinds[0] != kinds[1]:
        raise RequestError(
            f"{options.base} is {kinds[0]}, {options.changed} is {kinds[1]}: expected two of "
            "a kind."
        )
    made = _between_artifacts if kinds[0] == _ARTIFACT else _between_checkpoints
    _tell_difference(made(options), options.output.json)
    return 0


def _between_artifacts(options: DifferenceOptions) -> Difference:
    with ExitStack() as opened:
        base, ours = _open(options.base, opened)
        changed, theirs = _open(options.changed, opened)
        check_same_but_rows(base, changed, tolerance=options.tolerance)
        return write_difference(
            options.output.out,
            options.output.spec(base.manifest, changed.manifest),
            ours,
            theirs,
            base.manifest.model.vocab_size,
            tolerance=options.tolerance,
            overwrite=options.output.force,
            progress=opened.enter_context(StageBars()),
        )


def _between_checkpoints(options: DifferenceOptions) -> Difference:
    try:
        from edge_memllm_export import checkpoint_difference
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error

    with StageBars() as bars:
        found: Difference = checkpoint_difference(
            options.base,
            options.changed,
            options.output.out,
            name=options.output.title,
            description=options.output.description,
            codec=options.output.codec or "f16",
            tolerance=options.tolerance,
            overwrite=options.output.force,
            progress=bars,
        )
    return found


def _open(path: Path, opened: ExitStack) -> tuple[Artifact, Table]:
    artifact = opened.enter_context(Artifact.open(artifact_folder(path)))
    return artifact, opened.enter_context(closing(Table.open(artifact, "pread")))


def _alterations(options: EditOptions, texts: TokenTexts) -> list[Alteration]:
    if options.edits is not None:
        return read_edits(options.edits, texts.find)
    return [
        Alteration(
            tokens=tuple(map(texts.find, options.token)),
            layers=options.layers,
            scale=options.scale,
            blank=options.blank,
            like=None if options.like is None else texts.find(options.like),
            strength=options.strength,
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


def show(options: ShowOptions) -> int:
    """Run ``overlay show``."""
    overlay = open_overlay(options.overlay)
    text: Text | None = None
    if options.artifact is not None:
        with Artifact.open(artifact_folder(options.artifact)) as artifact:
            overlay.check_fits(artifact.manifest)
            text = token_texts(artifact).text
    if options.json:
        write_json(as_dict(overlay, text))
    else:
        print(page(overlay, text))
    return 0


def token_texts(artifact: Artifact) -> TokenTexts:
    """Return what makes tokens of words, and words of tokens."""
    return TokenTexts(Tokenizer.from_artifact(artifact), artifact.manifest.model.vocab_size)


def _tell_written(written: Written, as_json: bool) -> None:
    """Say what was written."""
    if as_json:
        write_json(_written(written))
    else:
        print(table(_rows(written)))


def _tell_difference(found: Difference, as_json: bool) -> None:
    """Say what was written, and how much differed."""
    if as_json:
        write_json({**_written(found.written), "compared": found.compared})
        return
    share = found.written.entries / found.compared
    compared = f"{number(found.written.entries)} of {number(found.compared)} rows ({share:.2%})"
    print(table([*_rows(found.written), ("differing", compared)]))


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


OVERLAY = Commands(
    {
        "edit": (
            "change rows by hand",
            Command(EditOptions, edit, _EDIT, _EDIT_EXAMPLES),
        ),
        "graft": (
            "take rows from another model",
            Command(GraftOptions, graft, _GRAFT, _GRAFT_EXAMPLES),
        ),
        "difference": (
            "store the rows that training changed",
            Command(DifferenceOptions, difference, _DIFFERENCE, _DIFFERENCE_EXAMPLES),
        ),
        "show": (
            "check an overlay and list what it does",
            Command(ShowOptions, show, _SHOW, _SHOW_EXAMPLES),
        ),
    },
    _DESCRIPTION,
    _EXAMPLES,
)
