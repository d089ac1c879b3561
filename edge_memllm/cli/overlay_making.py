"""What ``edge-memllm overlay edit``, ``graft`` and ``difference`` do: arguments to an overlay."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.artifact import Artifact
from edge_memllm.cli.overlay_page import tell_difference, tell_written, token_texts
from edge_memllm.cli.progress import StageBars
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.hub import artifact_folder
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.manifest import MANIFEST_NAME, Manifest
from edge_memllm.overlays import SUFFIX, OverlaySpec, write_overlay
from edge_memllm.overlays.composing import plain_codec
from edge_memllm.overlays.copying import Difference, write_difference, write_graft
from edge_memllm.overlays.editing import Alteration, checked_layers, edits_of
from edge_memllm.overlays.edits_file import read_edits
from edge_memllm.overlays.kinship import check_same_but_rows, check_same_shape
from edge_memllm.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

_ARTIFACT, _CHECKPOINT = "an artifact", "a checkpoint"


def edit(arguments: argparse.Namespace) -> int:
    """Run ``overlay edit``."""
    _check_edit(arguments)
    with ExitStack() as opened:
        artifact, table = _open(arguments.artifact, opened)
        spec = _spec(arguments, artifact.manifest, artifact.manifest)
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
        spec = _spec(arguments, artifact.manifest, other.manifest)
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
            _spec(arguments, base.manifest, changed.manifest),
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


def _spec(arguments: argparse.Namespace, base: Manifest, source: Manifest) -> OverlaySpec:
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
