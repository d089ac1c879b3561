"""An artifact under way: files that are sealed one by one, then the manifest that vouches for them.

Everything is built beside OUT; OUT appears in one rename, and only when it is published.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge_memllm.artifact.atomic import seal
from edge_memllm.artifact.manifest import (
    MANIFEST_NAME,
    FileSpec,
    GraphSpec,
    Manifest,
    TableSpec,
)
from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.artifact.producer import PRODUCER
from edge_memllm.errors import ExportError
from edge_memllm.progress import Progress
from edge_memllm.table.source import Rows
from edge_memllm_export.staging import Staging
from edge_memllm_export.table import TableForm, write_table

_COPY_BYTES = 4 << 20


class ArtifactWriter:
    """The files of one artifact, in a folder that is not yet where it will be."""

    def __init__(self, staging: Staging) -> None:
        self.path = staging.path
        self.files: dict[str, FileSpec] = {}
        self._staging = staging

    def seal(self, name: str) -> FileSpec:
        """List a file that is there now as part of the artifact, forced to the disk."""
        self.files[name] = seal(self.path / name)
        return self.files[name]

    def copy(self, name: str, source: BinaryIO) -> FileSpec:
        """Write the rest of an open file as a file of the artifact."""
        with (self.path / name).open("xb") as copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
        return self.seal(name)

    def write_table(
        self, form: TableForm, rows: Rows, name: str, identity: str, progress: Progress
    ) -> TableSpec:
        """Write all rows in their form."""
        table, self.files[name] = write_table(form, rows, self.path / name, identity, progress)
        return table

    def write_manifest(self, model: ModelSpec, table: TableSpec, graph: GraphSpec) -> Manifest:
        """Write the manifest, last. Raises ArtifactError for one that no reader would take."""
        manifest = Manifest(model, table, graph, self.files, PRODUCER)
        (self.path / MANIFEST_NAME).write_bytes(manifest.to_json())
        seal(self.path / MANIFEST_NAME)
        return manifest

    def publish(self) -> None:
        """Let the folder appear as OUT."""
        self._staging.publish()

    def set_aside(self) -> Path | None:
        """Keep the folder as OUT.refused; None if that cannot be."""
        return self._staging.set_aside()


@contextmanager
def writing_artifact(out: Path, *, overwrite: bool) -> Iterator[ArtifactWriter]:
    """Give the writer of a new artifact; what was in OUT is untouched until it is published.

    Raises ExportError for what cannot be written.
    """
    try:
        with Staging(out, overwrite=overwrite) as staging:
            yield ArtifactWriter(staging)
    except OSError as error:
        raise ExportError(
            f"{out}: writing failed ({error.strerror or error}). Check free space and permissions."
        ) from error
