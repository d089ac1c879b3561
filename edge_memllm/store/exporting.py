"""From what somebody names to the folder of an artifact, exported first if need be."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_memllm.artifact.manifest import FORMAT_VERSION
from edge_memllm.errors import ArtifactError, ExportError, RequestError, StorageError, missing_extra
from edge_memllm.hub import artifact_folder
from edge_memllm.hub.names import lacks_the_file
from edge_memllm.progress import Progress
from edge_memllm.statistics import give_back
from edge_memllm.store.source import Facts, HubSource, Source, hub_source, look
from edge_memllm.store.store import Entry, Record, Store

_log = logging.getLogger(__name__)

_PACKAGES = ("torch", "onnx_ir")
_GIVEN_BY_US = ("checkpoint", "out", "overwrite", "keep_refused", "progress")

# Rough, of two cores: what starts, and weights and rows a second, where bits are planned for each
# matrix and where a quantised file says them.
_START_SECONDS = 10
_PLANNED_A_SECOND, _KEPT_A_SECOND = 2e6, 13e6
# Bytes of the artifact for each value: int4 to int8 in the graph, int8 with its scales in the
# table; the embedding, which has two bytes a value, makes up for what the graph has in four bits.
_BYTES_OF_WEIGHT = 1.2
_BYTES_OF_ROW = 1.07


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export that is about to be made, as whoever is to allow it wants to know it."""

    source: str  # as it was named
    facts: Facts
    changed: bool  # there is one already, of what the source was before
    free_bytes: int | None  # on the disk it goes to

    @property
    def seconds(self) -> float:
        """About how long it will take, without the download."""
        kept = self.facts.number_bytes < 1.5  # fewer than 12 bits a weight
        rate = _KEPT_A_SECOND if kept else _PLANNED_A_SECOND
        return _START_SECONDS + (self._weights + self.facts.computed) / rate

    @property
    def bytes(self) -> float:
        """About how large the artifact will be."""
        return self._weights * _BYTES_OF_WEIGHT + self.facts.computed * _BYTES_OF_ROW

    @property
    def _weights(self) -> float:
        return self.facts.bytes / self.facts.number_bytes

    @property
    def finding(self) -> str:
        """What is there, as a sentence begins."""
        if self.changed:
            return f"{self.source}: has changed since it was exported"
        return f"{self.source}: is {self.facts.kind}, not an exported model"


Permission = Callable[[ExportPlan], None]  # raises what ends it


def refuse(plan: ExportPlan) -> None:
    """Raise the `ArtifactError` of a program that was not told to export anything."""
    raise ArtifactError(
        f"{plan.finding}. Have it exported into the cache, once, by load(..., export=True), or "
        f"where you want it: edge-memllm export {plan.source} OUT"
    )


def artifact_of(
    source: str | os.PathLike[str],
    options: Mapping[str, Any],
    permit: Permission,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of an artifact: of what is one, or of what is exported into the cache.

    `source` is an artifact, the folder of a checkpoint, a GGUF file, a model of the Hugging Face
    Hub, or a name of the store. What was exported before with the same `options` (those of
    `edge_memllm_export.export_model`), and has not changed, is taken at once. Before an export
    `permit` is asked, once it is sure that nobody else makes the same. `progress` is told of the
    stages of the export, and of "waiting" for another process that exports the same.

    Raises `ArtifactError` for what is none of these, `RequestError` for an option that there is
    not, `ExportError` and `RuntimeUnavailableError` as an export does, `StorageError` where
    nothing can be written, and what `permit` raises.
    """
    check_options(options)
    found = look(source)
    if isinstance(found, Path):
        return found
    store = Store.of_user()
    if found is None and not options and (known := store.named(os.fspath(source))) is not None:
        return _used(known)
    wanted: Source | None = found or hub_source(source)
    if wanted is None:
        raise ArtifactError(
            f"{os.fspath(source)}: does not exist, expected the folder of an exported model, that "
            "of a checkpoint, a .gguf file, a model of the Hugging Face Hub such as org/name, or "
            "a name that 'edge-memllm list' shows."
        )
    entry = store.entry(wanted, options)
    fingerprint = wanted.fingerprint()
    if _is_of(entry, fingerprint):
        return _used(entry)
    if isinstance(wanted, HubSource) and (folder := _published(wanted)) is not None:
        return folder
    export = _Export(os.fspath(source), wanted, fingerprint, entry, options)
    return export.once(permit, progress or (lambda *_: None))


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `RequestError` for what is no option of an export, or not for the caller to say."""
    if not options:
        return
    from edge_memllm.options.export import ExportOptions

    known = [name for name in ExportOptions.__dataclass_fields__ if name not in _GIVEN_BY_US]
    for name in options:
        if name not in known or name == "_":
            raise RequestError(f"export: {name!r} is no option of it, expected {', '.join(known)}.")


def _published(source: HubSource) -> Path | None:
    """Return the folder of a model that is an artifact on the Hub, downloaded; None for others."""
    if source.variant is not None:
        return None
    try:
        return artifact_folder(f"hf://{source.model}")
    except ArtifactError as error:
        if not lacks_the_file(error):
            raise
    return None


def _is_of(entry: Entry, fingerprint: str) -> bool:
    """Whether a model is there that was made of the source as it is, in the form of today."""
    record = entry.record
    return record is not None and (record.fingerprint, record.format_version) == (
        fingerprint,
        FORMAT_VERSION,
    )


def _used(entry: Entry) -> Path:
    if entry.record is None:
        raise ArtifactError(
            f"{entry.folder.name}: its export did not end, so there is no model of that name. "
            "Export it again by naming its source, or remove it: edge-memllm remove "
            f"{entry.folder.name}"
        )
    entry.note_use()
    return entry.artifact


@dataclass(frozen=True, slots=True)
class _Export:
    """One export into the cache, that may have to be made."""

    named: str
    source: Source
    fingerprint: str
    entry: Entry
    options: Mapping[str, Any]

    def once(self, permit: Permission, progress: Progress) -> Path:
        """Make it, unless another process has by the time it is our turn."""
        for package in _PACKAGES:
            if find_spec(package) is None:
                raise missing_extra(package, "export")
        facts = self.source.facts()
        try:
            with self.entry.exporting(progress):
                if not _is_of(self.entry, self.fingerprint):
                    changed = self.entry.record is not None
                    permit(ExportPlan(self.named, facts, changed, self._free_bytes()))
                    self._make(progress)
        finally:
            self.entry.forget_if_empty()
        return _used(self.entry)

    def _make(self, progress: Progress) -> None:
        from edge_memllm_export import export_model

        path, artifact = self.source.fetch(), self.entry.artifact
        _log.info("%s: exporting into %s", self.named, artifact)
        try:
            self.entry.clear_rest()
            export_model(
                path,
                artifact,
                **self.options,
                overwrite=True,
                keep_refused=False,
                progress=progress,
            )
        except ExportError as error:
            raise ExportError(
                f"{error} To export it with other options: edge-memllm export {path} OUT"
            ) from error
        except OSError as error:
            raise StorageError(f"{artifact}: {error.strerror or error}.") from error
        self.entry.write(Record.of(self.source, self.fingerprint))
        give_back()  # what the export has used is not what the model will need

    def _free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self.entry.folder).free
        except OSError:
            return None
