"""Models by name: asking before one is exported, and ``edge-memllm list`` and ``remove``."""

from __future__ import annotations

import os
import time
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import edge_memllm
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import StageBars, byte_count, confirmed, say, table, write_json
from edge_memllm.errors import RequestError
from edge_memllm.hub import artifact_folder
from edge_memllm.loading import LoadOptions
from edge_memllm.model import Model
from edge_memllm.options import Option, keywords
from edge_memllm.store import Entry, ExportPlan, Store, artifact_of

_LIST = """\
List the models that were exported into the cache: what 'run', 'serve', 'bench' and 'eval' have made
of checkpoints and GGUF files, and 'load' of Python. The newest use comes first. They lie in
~/.cache/edge-memllm (or where the system has its caches); EDGE_MEMLLM_HOME is another folder.

What is listed as incomplete was left by an export that was killed; the next one of the same source
uses its place."""

_LIST_EXAMPLES = """\
  edge-memllm list
  edge-memllm list --json"""

_REMOVE = """\
Remove models from the cache, by the names that 'edge-memllm list' shows or by their sources. The
sources stay, and so does what was downloaded from the Hugging Face Hub. What a process has open, or
exports, is not removed."""

_REMOVE_EXAMPLES = """\
  edge-memllm remove tiny-english org/name:Q4_K_M
  edge-memllm remove --all --yes"""

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"))

Yes = Annotated[
    bool,
    Option("export what is no exported model into the cache, without asking", also=("-y",)),
]


def load_model(loading: LoadOptions, *, yes: bool) -> Model:
    """Load a model, exported first if need be and allowed. Raises as `load`, and `RequestError`."""
    with StageBars() as bars:
        path = local_artifact(loading.path, bars, yes=yes)
        return edge_memllm.load(**keywords(replace(loading, path=path, progress=bars)))


def known_artifact(path: Path) -> Path:
    """Return the folder of an artifact: that of a name in the cache, of the Hub, or `path` itself.

    Nothing is exported. Raises as `edge_memllm.hub.artifact_folder`.
    """
    entry = None if path.exists() else Store.of_user().named(str(path))
    return artifact_folder(path) if entry is None else entry.artifact


def local_artifact(source: str | os.PathLike[str], bars: StageBars, *, yes: bool) -> Path:
    """Return the folder of an artifact, exported first if need be and allowed.

    Raises as `artifact_of`, and `RequestError` where it is not allowed.
    """

    def permit(plan: ExportPlan) -> None:
        bars.end_stage()
        _permit(plan, yes)

    return artifact_of(source, {}, permit, bars)


def _permit(plan: ExportPlan, yes: bool) -> None:
    cost = f"about {_duration(plan.seconds)} and {byte_count(_rounded(plan.bytes))}"
    if plan.facts.download:
        cost += f", after a download of {byte_count(plan.facts.download)}"
    by_hand = f"edge-memllm export {plan.source} OUT"
    if yes:
        say(f"{plan.finding}. Exporting it into the cache: {cost}.")
        return
    room = plan.free_bytes
    scarce = room is not None and room < plan.bytes + plan.facts.download
    free = f" ({byte_count(room)} are free)" if room is not None and scarce else ""
    match confirmed(f"{plan.finding}.\nExporting it once takes {cost}{free}; go on?"):
        case None:
            raise RequestError(
                f"{plan.finding}. Exporting it once, into the cache, takes {cost}{free}: say "
                f"--yes, or export it where you want it: {by_hand}"
            )
        case False:
            raise RequestError(f"Nothing was exported. To choose how and where: {by_hand}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    return f"{seconds / 60:.0f} minutes"


def _rounded(count: float) -> float:
    """An estimate has two digits."""
    return float(f"{count:.1e}")


@dataclass(frozen=True)
class ListOptions:
    """What may be asked of ``edge-memllm list``."""

    _: KW_ONLY
    json: Json = False


@dataclass(frozen=True)
class RemoveOptions:
    """What may be asked of ``edge-memllm remove``."""

    names: Annotated[
        tuple[str, ...],
        Option("names that 'list' shows", metavar="NAME", parse=str, several="words"),
    ] = ()
    _: KW_ONLY
    all: Annotated[bool, Option("all of them")] = False
    yes: Annotated[bool, Option("without asking", also=("-y",))] = False
    json: Json = False


def list_models(options: ListOptions) -> int:
    """Run ``edge-memllm list``."""
    store = Store.of_user()
    found = sorted(store.names().items(), key=lambda each: -(each[1].used or 0))
    if options.json:
        models = [_as_dict(name, entry) for name, entry in found]
        write_json({"folder": str(store.folder), "models": models})
        return 0
    if not found:
        print(f"no models in {store.folder}: 'edge-memllm run SOURCE' exports one")
        return 0
    rows = [_row(name, entry) for name, entry in found]
    print(table([("name", "form", "size", "used", "source"), *rows]))
    return 0


def _as_dict(name: str, entry: Entry) -> dict[str, Any]:
    record, manifest = entry.record, entry.manifest
    described = {} if record is None else asdict(record)
    form = (None, None) if manifest is None else (manifest.graph.weights, manifest.table.codec)
    return {
        "name": name,
        "complete": record is not None,
        "source": described.get("source"),
        "path": str(entry.artifact),
        "graph_weights": form[0],
        "table_codec": form[1],
        "bytes": entry.bytes,
        "made": described.get("made"),
        "used": None if entry.used is None else int(entry.used),
    }


def _row(name: str, entry: Entry) -> tuple[str, ...]:
    record, size = entry.record, byte_count(entry.bytes)
    if record is None:
        return (name, "incomplete", size, "", "")
    return (name, _form(entry.manifest), size, _ago(entry.used), record.source)


def _form(manifest: Manifest | None) -> str:
    if manifest is None:
        return "unreadable"
    return f"{manifest.graph.weights}, table {manifest.table.codec}"


def _ago(moment: float | None) -> str:
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - moment)
    for unit, word in _UNITS:
        if seconds >= unit:
            count = int(seconds // unit)
            return f"{count} {word}{'s' if count > 1 else ''} ago"
    return "just now"


def remove(options: RemoveOptions) -> int:
    """Run ``edge-memllm remove``; raises at the end for what is in use."""
    entries = _chosen(options)
    sizes = {name: entry.bytes for name, entry in entries.items()}
    if entries and not options.yes:
        _ask_to_remove(sizes)
    kept = [name for name, entry in entries.items() if not entry.remove()]
    removed = {name: size for name, size in sizes.items() if name not in kept}
    if options.json:
        write_json({"removed": list(removed), "in_use": kept, "bytes": sum(removed.values())})
    elif removed:
        print(f"removed {', '.join(removed)}: {byte_count(sum(removed.values()))}")
    elif not kept:
        print("there was nothing to remove")
    if kept:
        raise RequestError(
            f"{', '.join(kept)}: in use by a process that runs or exports it, and was kept. End "
            "the process first."
        )
    return 0


def _chosen(options: RemoveOptions) -> dict[str, Entry]:
    """What is meant, by name. Raises `RequestError` if one of the names is none."""
    if bool(options.names) == options.all:
        raise RequestError("Give names that 'edge-memllm list' shows, or --all.")
    store = Store.of_user()
    known = store.names()
    if options.all:
        return known
    found: dict[str, Entry] = {}
    for name in options.names:
        entry = store.named(name)
        if entry is None:
            there = ", ".join(known) or "nothing"
            raise RequestError(f"{name}: no model of that name is in the cache. There is: {there}.")
        found[next(each for each, place in known.items() if place == entry)] = entry
    return found


def _ask_to_remove(sizes: dict[str, int]) -> None:
    what = f"{', '.join(sizes)} ({byte_count(sum(sizes.values()))})"
    match confirmed(f"Remove {what}?"):
        case None:
            raise RequestError(f"{what} would be removed. Say --yes where nobody can be asked.")
        case False:
            raise RequestError("Nothing was removed.")


LIST = Command(ListOptions, list_models, _LIST, _LIST_EXAMPLES)
REMOVE = Command(RemoveOptions, remove, _REMOVE, _REMOVE_EXAMPLES)
