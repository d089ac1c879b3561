"""``edge-memllm verify``: every byte of an artifact against its manifest, and its checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.options import add_command, add_json
from edge_memllm.cli.output import number, write_json
from edge_memllm.errors import missing_extra

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm.cli.options import Commands
    from edge_memllm_export import Rung

_DESCRIPTION = """\
Check a whole artifact: the digest of every file, the checksum of every record of the table, that
padding is zero, and that graph, table and manifest belong to the same model. The graph is loaded
for that.

With --against the artifact is also compared with the checkpoint it was exported from: the parity
ladder, six rungs from codec to chunked prefill. That needs the export extra."""

_EXAMPLES = """\
  edge-memllm verify artifact
  edge-memllm verify artifact --against checkpoint"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "verify",
        execute,
        summary="check every byte of an artifact",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKPOINT", help="compare it with its checkpoint"
    )
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from edge_memllm.artifact.folder import Artifact
    from edge_memllm.hub import artifact_folder

    folder = artifact_folder(arguments.artifact)
    with Artifact.open(folder) as artifact:
        _check(artifact)
        facts = _facts(artifact)
    rungs = _ladder(folder, arguments.against) if arguments.against else []
    ok = all(rung.ok for rung in rungs)
    if arguments.json:
        write_json({"ok": ok, **facts, "rungs": [asdict(rung) | {"ok": rung.ok} for rung in rungs]})
    else:
        print(_page(facts, rungs))
    return 0 if ok else 1


def _check(artifact: Artifact) -> None:
    """Files and records, then the graph, which refuses a table of another model."""
    from edge_memllm.artifact.verification import verify_artifact
    from edge_memllm.cli.output import StageBars
    from edge_memllm_runtimes import open_runtime

    with StageBars() as bars:
        verify_artifact(artifact, bars)
    open_runtime(artifact, "cpu").close()


def _ladder(artifact: Path, checkpoint: Path) -> list[Rung]:
    try:
        from edge_memllm_export import verify_against
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    return verify_against(artifact, checkpoint)


def _facts(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "identity": manifest.model.identity,
        "files": len(manifest.files),
        "bytes": sum(spec.bytes for spec in manifest.files.values()),
        "records": manifest.model.vocab_size,
    }


def _page(facts: dict[str, Any], rungs: list[Rung]) -> str:
    from edge_memllm.cli.export import rung_table

    whole = (
        f"ok: {facts['files']} files, {number(facts['bytes'])} bytes, {number(facts['records'])} "
        f"records; graph and table belong to {facts['identity']}"
    )
    return f"{whole}\n\n{rung_table(rungs)}" if rungs else whole
