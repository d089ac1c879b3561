"""Artifact in, artifact out: the same model with its table in another codec.

Needs neither checkpoint nor torch. Rows are read, decoded and encoded in chunks; the graph is
copied, and where the new codec is fed in another form, the part that takes in rows is exchanged.
Everything is built in OUT.partial, compared with the source, and published in one rename.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edge_memllm.arrays import Logits
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import TableLayout
from edge_memllm.artifact.manifest import GraphSpec, Manifest
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.codecs import FAITHFUL, Codec, codec_id, get_codec
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError, CorruptionError, ExportError
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm.mixed_precision import ExactModel, Target
from edge_memllm.options import called_with
from edge_memllm.options.export import RequantizeOptions
from edge_memllm.progress import Progress
from edge_memllm.table.table import Table
from edge_memllm.text import TOKENIZER_FILE
from edge_memllm_export.artifact_writer import ArtifactWriter, writing_artifact
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.tokens import memory_rows
from edge_memllm_export.table import (
    MixedFigures,
    TableForm,
    check_table_options,
    learned,
    mixed,
)
from edge_memllm_export.texts import TableText, table_text
from edge_memllm_export.weights.quantizer import compute_dtype
from edge_memllm_export.weights.stored_matrix import in_floats
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.ort_graph import check_artifact_graph

_NODES = "/model/memory/"
_INITIALISERS = "model.memory."
_WIRE_INPUTS = ("memory_rows", "memory_codes", "memory_scales")

_TOKENS = 64
# Beyond this the graph does not compute what it did, whatever the codec: a wrong wire costs nats.
_MAX_MEAN_KL = 1.0


def rewire_graph(source: Path, out: Path, weights: str, memory: MemorySpec, codec: Codec) -> None:
    """Write the graph at `source` to `out`, fed in the wire form of `codec`.

    `weights` is the manifest's word for the graph's matrices. Weights outside of the file stay
    where the file says, beside it. Raises `ArtifactError` for a graph that is not the exporter's.
    """
    model = ir.load(source)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    old = [node for node in graph if (node.name or "").startswith(_NODES)]
    if not old or not {"token_index", "memory_gain"} <= set(inputs):
        raise ArtifactError(
            f"{source}: the part that takes in the table's rows was not found. Only graphs made "
            "by 'edge-memllm export' can be changed; export the model again."
        )
    builder = GraphBuilder(compute_dtype(weights), in_floats)
    gain, index = inputs["memory_gain"], inputs["token_index"]
    wire, rows = memory_rows(builder, memory, codec, gain, index)
    nodes, initialisers = builder.recorded()
    graph.insert_before(old[0], nodes)
    for node, place in list(old[-1].outputs[0].uses()):
        node.replace_input_with(place, rows)
    graph.remove(old, safe=True)
    _replace_inputs(graph, wire)
    for name in [name for name in graph.initializers if name.startswith(_INITIALISERS)]:
        del graph.initializers[name]
    for value in initialisers:
        graph.register_initializer(value)
    ir.save(model, out)


def _replace_inputs(graph: ir.Graph, wire: list[ir.Value]) -> None:
    """Exchange the wire form's inputs, in their place among the others."""
    places = [place for place, value in enumerate(graph.inputs) if value.name in _WIRE_INPUTS]
    graph.inputs[places[0] : places[-1] + 1] = wire


def compare_artifacts(reference: Path, other: Path) -> tuple[float, int]:
    """Return the mean KL divergence (nats) from `reference` to `other`, and over how many tokens.

    The tokens are spread over the vocabulary, so rows of rare tokens count as much as others.
    """
    with Artifact.open(reference) as artifact:
        model = artifact.manifest.model
        count = min(_TOKENS, model.max_position_embeddings, model.vocab_size)
    ids = np.random.default_rng(0).permutation(model.vocab_size)[:count].tolist()
    truth, found = (_logits(path, ids) for path in (reference, other))
    return float(divergences(truth, found).mean()), count


def _logits(path: Path, ids: Sequence[int]) -> Logits:
    """Float32 [T, V]."""
    with (
        Artifact.open(path) as artifact,
        closing(Table.open(artifact, "pread")) as table,
        closing(open_runtime(artifact, "cpu")) as runtime,
        Feeder(runtime, table, 1, len(ids)) as feeder,
    ):
        return feeder.score(0, ids).copy()


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
    mixed: MixedFigures | None = None


@called_with(RequantizeOptions)
def requantize(options: RequantizeOptions) -> RequantizeReport:
    """Write the artifact in the folder `artifact` to `out`, its table in another codec.

    `table_codec` is a word or id of docs/codecs.md; instead of it, `table_target` has the bits of
    each layer and class of tokens chosen (docs/quantisation.md). `table_search` tries several
    scales for each group. `table_text` says how often tokens come, to codecs that learn: None
    counts all once, and a target takes a text that comes along. `progress(stage, done, total)` is
    called on the way.

    Raises `ExportError` for a codec or a target that cannot be, a dense model, or a result that
    does not compute what the source computes, `ArtifactError` for a source that cannot be used;
    nothing is left behind then, and what was in OUT is untouched.
    """
    artifact, out = options.artifact, Path(os.path.abspath(options.out))
    target, text = options.table_target, options.table_text
    if out == Path(os.path.abspath(artifact)):
        raise ExportError(f"{out}: the source cannot be its own result. Name another folder.")
    report = options.progress or (lambda stage, done, total: None)
    with Artifact.open(artifact) as source, closing(Table.open(source, "pread")) as table:
        form = _first_form(source.manifest, options.table_codec, target, options.table_search)
        if target is None:
            check_table_options(form.layout, search=options.table_search, text=text)
        with writing_artifact(out, overwrite=options.overwrite) as writer:
            form = _complete(form, source, table, target, text, report)
            if not form.layout.embedding.plain:
                form = replace(form, stored=table.stored_embeddings)
            manifest = _Requantizing(source, writer).write(form, table, report)
            report("comparing", 0, 1)
            mean_kl, tokens = compare_artifacts(source.path, writer.path)
            report("comparing", 1, 1)
            if not mean_kl <= _MAX_MEAN_KL:
                raise ExportError(
                    f"{out}: the new artifact does not compute what {artifact} computes: mean "
                    f"KL divergence {mean_kl:.3g} nats over {tokens} tokens, at most "
                    f"{_MAX_MEAN_KL:g} was expected. Choose a codec with more bits."
                )
            writer.publish()
    old = source.manifest
    return RequantizeReport(
        path=out,
        manifest=manifest,
        source_codec=old.table.codec,
        faithful_source=old.table.codec in FAITHFUL,
        graph_rewired=_needs_rewiring(old.layout, form.layout),
        mean_kl=mean_kl,
        compared_tokens=tokens,
        mixed=form.figures,
    )


def _needs_rewiring(old: TableLayout, new: TableLayout) -> bool:
    """Whether the graph is fed otherwise: another wire form, or another group in it."""
    grouped = new.wire in ("q8", "q4")
    return old.wire != new.wire or (grouped and old.group != new.group)


def _first_form(
    manifest: Manifest, word: str | None, target: Target | None, search: bool
) -> TableForm:
    """The form that is asked for; with a target its codec is still to be found."""
    model, old = manifest.model, manifest.layout
    if old.layers == 0:
        raise ExportError(
            "A model without token memory (dense) has no memory rows: there is nothing to store."
        )
    if (word is None) == (target is None):
        raise ExportError(
            f"table codec {word}, target {target}: expected one of the two. Name a codec, or a "
            "target in bits or bytes."
        )
    if word is None:
        if manifest.table.codec not in FAITHFUL:
            raise ExportError(
                f"The table is stored as {manifest.table.codec}: what each layer loses by fewer "
                "bits can only be measured on exact rows. Give an artifact with an f16, bf16 or "
                "f32 table."
            )
        return TableForm(old, model.vocab_size, search)
    try:
        layout: TableLayout = old.with_codec(get_codec(codec_id(word, model.memory.width)))
    except ValueError as error:
        raise ExportError(str(error)) from error
    return TableForm(layout, model.vocab_size, search)


def _complete(
    form: TableForm,
    source: Artifact,
    table: Table,
    target: Target | None,
    text: str | None,
    progress: Progress,
) -> TableForm:
    """The form with its codec and all that is to be learned."""
    if target is None:
        return learned(form, table, None if text is None else _text(source, text), progress)
    context = source.manifest.model.max_position_embeddings
    with closing(open_runtime(source, "cpu")) as runtime:
        exact = ExactModel(table, runtime, table.layout, context)
        return mixed(form, target, exact, _text(source, text), progress)


def _text(source: Artifact, text: str | None) -> TableText:
    known = TOKENIZER_FILE in source.manifest.files
    return table_text(
        source.read_bytes(TOKENIZER_FILE) if known else None,
        text,
        source.manifest.model.vocab_size,
        str(source.path),
    )


class _Requantizing:
    """One run: a source that is open, and the artifact that is made of it."""

    def __init__(self, source: Artifact, writer: ArtifactWriter) -> None:
        self._source = source
        self._manifest = source.manifest
        self._writer = writer

    def write(self, form: TableForm, table: Table, progress: Progress) -> Manifest:
        """Write all files, the manifest last, and force them to the disk."""
        old = self._manifest
        for name in sorted(set(old.files) - {old.table.file, old.graph.file}):
            self._copy(name)
        graph = self._write_graph(form.layout)
        identity = old.model.identity
        spec = self._writer.write_table(form, table, old.table.file, identity, progress)
        return self._writer.write_manifest(old.model, spec, graph)

    def _copy(self, name: str) -> None:
        with os.fdopen(self._source.open_file(name), "rb") as source:
            copied = self._writer.copy(name, source)
        if copied != self._manifest.files[name]:  # or the new manifest vouches for it
            raise CorruptionError(
                f"{self._source.path / name}: changed while it was copied. Copy the folder again."
            )

    def _write_graph(self, layout: TableLayout) -> GraphSpec:
        spec = self._manifest.graph
        codec = layout.kinds[0].codec  # all sections are fed alike
        self._copy(spec.file)
        if not _needs_rewiring(self._manifest.layout, layout):
            return spec
        check_artifact_graph(self._source)  # before a library reads it
        file = self._writer.path / spec.file
        rewired = file.with_name(f"{file.name}.new")
        rewire_graph(file, rewired, spec.weights, self._manifest.model.memory, codec)
        os.replace(rewired, file)
        self._writer.seal(spec.file)
        return replace(spec, wire=codec.wire)
