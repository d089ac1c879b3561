"""Artifact in, artifact out: the same model with its table in another codec.

Needs neither checkpoint nor torch. Rows are read, decoded and encoded in chunks; the graph is
copied, and where the new codec is fed in another form, the part that takes in rows is exchanged.
Everything is built in OUT.partial, compared with the source, and published in one rename.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edge_memllm
from edge_memllm.artifact import Artifact
from edge_memllm.codecs import Codec, get_codec
from edge_memllm.codecs.codec import Floats
from edge_memllm.codecs.words import codec_id
from edge_memllm.errors import ExportError
from edge_memllm.manifest import MANIFEST_NAME, FileSpec, GraphSpec, Manifest, TableSpec
from edge_memllm.records import RecordBuffer, RecordLayout
from edge_memllm.table import Table
from edge_memllm.table_writer import TableWriter
from edge_memllm_export.comparison import compare_artifacts
from edge_memllm_export.graph_rewire import rewire_graph
from edge_memllm_export.staging import Staging

Progress = Callable[[str, int, int], None]

# Decoded rows of a chunk: the temporaries of encoding are of the same order.
_CHUNK_BYTES = 64 << 20
# Codecs whose rows are as good as the network's: any other adds its own error to the new one's.
_FAITHFUL = ("f32", "f16", "bf16")
# Beyond this the graph does not compute what it did, whatever the codec: a wrong wire costs nats.
_MAX_MEAN_KL = 1.0


@dataclass(frozen=True)
class RequantizeReport:
    """What was made. `mean_kl` is from the source's logits to the new ones', in nats."""

    path: Path
    manifest: Manifest
    source_codec: str
    faithful_source: bool  # False: the source's own quantisation error stays in the rows
    graph_rewired: bool
    mean_kl: float
    compared_tokens: int


def requantize(
    artifact: Path,
    out: Path,
    *,
    table_codec: str,
    table_search: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RequantizeReport:
    """Write the artifact in the folder `artifact` to `out`, its table in another codec.

    `table_codec` is a word or id of docs/codecs.md; `table_search` tries several scales for each
    group. `progress(stage, done, total)` is called on the way.

    Raises `ExportError` for a codec that cannot be, a dense model, or a result that does not
    compute what the source computes; nothing is left behind then, and what was in OUT is untouched.
    """
    out = Path(os.path.abspath(out))
    if out == Path(os.path.abspath(artifact)):
        raise ExportError(f"{out}: the source cannot be its own result. Name another folder.")
    report = progress or (lambda stage, done, total: None)
    with Artifact.open(artifact) as source, closing(Table.open(source, "pread")) as table:
        layout = _new_layout(source.manifest, table_codec, table_search)
        try:
            with Staging(out, overwrite=overwrite) as staging:
                work = _Requantizing(source, table, layout, staging.path, report)
                manifest = work.write(table_search)
                report("comparing", 0, 1)
                mean_kl, tokens = compare_artifacts(source.path, staging.path)
                report("comparing", 1, 1)
                if not mean_kl <= _MAX_MEAN_KL:
                    raise ExportError(
                        f"{out}: the new artifact does not compute what {artifact} computes: mean "
                        f"KL divergence {mean_kl:.3g} nats over {tokens} tokens, at most "
                        f"{_MAX_MEAN_KL:g} was expected. Choose a codec with more bits."
                    )
                staging.publish()
        except OSError as error:
            raise ExportError(
                f"{out}: writing failed ({error.strerror or error}). Check free space and "
                "permissions."
            ) from error
    old = source.manifest
    return RequantizeReport(
        path=out,
        manifest=manifest,
        source_codec=old.table.codec,
        faithful_source=old.table.codec in _FAITHFUL,
        graph_rewired=_needs_rewiring(get_codec(old.table.codec), layout.codec),
        mean_kl=mean_kl,
        compared_tokens=tokens,
    )


def _new_layout(manifest: Manifest, word: str, search: bool) -> RecordLayout:
    model, old = manifest.model, manifest.layout
    if old.layers == 0:
        raise ExportError("A dense model (beta 8) has no memory rows: there is nothing to store.")
    try:
        codec = get_codec(codec_id(word, model.hidden_size))
        layout = replace(old, codec=codec)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if search and not codec.searches:
        raise ExportError(f"Codec {codec.id} has no scales to search for. Leave the search out.")
    return layout


def _needs_rewiring(old: Codec, new: Codec) -> bool:
    """Whether the graph is fed otherwise: another wire form, or another group in it."""
    grouped = new.wire in ("q8", "q4")
    return old.wire != new.wire or (grouped and old.group != new.group)


class _Requantizing:
    """One run: a source that is open, and the folder `path` that is filled."""

    def __init__(
        self, source: Artifact, table: Table, layout: RecordLayout, path: Path, progress: Progress
    ) -> None:
        self._source = source
        self._manifest = source.manifest
        self._table = table
        self._layout = layout
        self._path = path
        self._progress = progress
        self._files: dict[str, FileSpec] = {}

    def write(self, search: bool) -> Manifest:
        """Write all files, the manifest last, and force them to the disk."""
        old = self._manifest
        names = (old.table.file, old.graph.file)
        for name in sorted(set(old.files) - set(names)):
            self._copy(name)
        graph = self._write_graph()
        table = self._write_table(search)
        manifest = replace(
            old,
            graph=graph,
            table=table,
            files=self._files,
            producer=f"edge-memllm {edge_memllm.__version__}",
        )
        (self._path / MANIFEST_NAME).write_bytes(manifest.to_json())
        _seal(self._path / MANIFEST_NAME)
        return manifest

    def _copy(self, name: str) -> None:
        with (
            os.fdopen(self._source.open_file(name), "rb") as source,
            (self._path / name).open("xb") as copy,
        ):
            shutil.copyfileobj(source, copy, 4 << 20)
        self._files[name] = _seal(self._path / name)

    def _write_graph(self) -> GraphSpec:
        spec, codec = self._manifest.graph, self._layout.codec
        self._copy(spec.file)
        if not _needs_rewiring(get_codec(self._manifest.table.codec), codec):
            return spec
        file = self._path / spec.file
        rewired = file.with_name(f"{file.name}.new")
        rewire_graph(file, rewired, spec.weights, self._layout.layers, self._layout.width, codec)
        os.replace(rewired, file)
        self._files[spec.file] = _seal(file)
        return replace(spec, wire=codec.wire)

    def _write_table(self, search: bool) -> TableSpec:
        layout, model = self._layout, self._manifest.model
        if layout.parameters_bytes:
            fit = layout.codec.fit(layout.layers, layout.width)
            for _, rows in self._chunks("learning"):
                fit.add(rows)
            layout = layout.with_parameters(fit.parameters())
        name = self._manifest.table.file
        with TableWriter(
            self._path / name, layout, model.vocab_size, model.identity, search=search
        ) as writer:
            for embedding, rows in self._chunks("table"):
                writer.append(embedding, rows)
            spec, self._files[name] = writer.finish()
        return spec

    def _chunks(self, stage: str) -> Iterator[tuple[Floats, Floats]]:
        """Embeddings [N, D] and rows [N, L, D] of all tokens, in order.

        The next chunk is read and decoded while its receiver works on the one before.
        """
        layout, total = self._table.layout, self._manifest.model.vocab_size
        count = max(1, _CHUNK_BYTES // (4 * layout.layers * layout.width))
        chunks = [np.arange(start, min(start + count, total)) for start in range(0, total, count)]
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._decoded, chunks[0])
            for ids, following in zip_longest(chunks, chunks[1:]):
                decoded = coming.result()
                if following is not None:
                    coming = ahead.submit(self._decoded, following)
                yield decoded
                self._progress(stage, int(ids[-1]) + 1, total)

    def _decoded(self, ids: NDArray[np.int64]) -> tuple[Floats, Floats]:
        buffer = RecordBuffer(self._table.layout, len(ids))
        self._table.fetch(ids, buffer)
        return buffer.embedding(len(ids)).astype(np.float32), buffer.rows(len(ids))


def _seal(path: Path) -> FileSpec:
    """Force a file to the disk; its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSpec(os.fstat(file.fileno()).st_size, digest)
