"""Checkpoint in, artifact out: graph, table, tokenizer, manifest, verification, publication.

Everything is written to OUT.partial and judged there; OUT appears in one rename. The same
checkpoint and options give the same bytes on the same machine: another processor, number of
threads or chunk may sum a row in another order.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.artifact.manifest import GraphSpec, Manifest
from edge_memllm.codecs import codec_id, get_codec
from edge_memllm.errors import ArtifactError, ExportError, RuntimeUnavailableError
from edge_memllm.mixed_precision import ExactModel, Target
from edge_memllm.modeling.training import keep_to_quota
from edge_memllm.options import called_with
from edge_memllm.options.export import COMPUTE_DTYPES, EXPORT_DEVICES, GRAPH_FORMS, ExportOptions
from edge_memllm.progress import Progress
from edge_memllm.table.source import Rows
from edge_memllm.text import TEXT_FILES, TOKENIZER_FILE, VOCABULARY_FILE
from edge_memllm_export.artifact_writer import ArtifactWriter, writing_artifact
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.embedding import EmbeddingChoice, choose_embedding, default_form
from edge_memllm_export.graph.model import (
    EXTERNAL_FILE,
    GRAPH_FILE,
    OPSET,
    GraphForm,
    build_graph,
    save_graph,
)
from edge_memllm_export.graph_matrices import Budget, graph_matrices
from edge_memllm_export.judging.judged_artifact import JudgedArtifact, text_tokens
from edge_memllm_export.judging.ladder import ParityCheck, parity_checks
from edge_memllm_export.judging.quality import (
    LEAST_TOKENS,
    Quality,
    measure_quality,
    token_budget,
    with_answers,
)
from edge_memllm_export.judging.remedies import remedy
from edge_memllm_export.kept_rows import RowsChoice, choose_rows
from edge_memllm_export.table import (
    MixedFigures,
    TableForm,
    check_table_options,
    learned,
    mixed,
)
from edge_memllm_export.text_files import check_text_files
from edge_memllm_export.texts import (
    TableText,
    check_separate,
    encyclopaedia_text,
    fitting_text,
    judging_text,
    table_text,
)
from edge_memllm_export.vocabulary import vocabulary_file
from edge_memllm_export.weights.allocation import Allocation
from edge_memllm_export.weights.kept_grids import GridStore
from edge_memllm_export.weights.kv_steps import kv_scales
from edge_memllm_export.weights.quantizer import (
    QUANTISED,
    check_block,
    check_matrix_forms,
    compute_dtype,
    named_form,
    quantisation_method,
)

TABLE_FILE = "table.safetensors"
# Of records: a block of what storage reads directly; where they are smaller than that, padding to
# it would be most of the table.
_ALIGNMENT, _DENSE_ALIGNMENT = 512, 64

_DELICATE_FORM = "int8"  # of matrices of delicate kinds, where the others have fewer bits
# Of the tables of angles: where those of all positions are more, a model's context is cut.
_ANGLES_BYTES = 32 << 20

# What `auto` promises of perplexity; it plans by divergence (`graph_matrices.PROMISE`).
_PROMISED_INCREASE = 0.02

_log = logging.getLogger(__name__)


def graph_form(source: Checkpoint, options: ExportOptions) -> GraphForm:
    """The form of graph and rows that these name, or an ExportError that lists what there is."""
    asked, kv_dtype = options.graph_weights, options.kv_dtype
    if asked not in GRAPH_FORMS:
        raise ExportError(f"graph weights {asked!r}, expected one of {', '.join(GRAPH_FORMS)}.")
    stored = "mixed" if asked == "auto" else asked
    # A target is for the rows, and for matrices only where there are none.
    for_matrices = options.table_target is not None and not source.spec.memory.layers
    kept = asked == "auto" and not for_matrices and source.has_grids
    method = quantisation_method(options.graph_method, asked)
    try:
        width = source.spec.memory.width or source.spec.hidden_size
        chosen = codec_id(options.table_codec or "int8", width)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if not source.spec.memory.layers:
        chosen = "none"
    elif chosen == "none":
        raise ExportError(
            f"table codec none is for models without token memory (dense), {source.path} has "
            "one. Choose a codec that stores rows."
        )
    dtype = compute_dtype(stored)
    _check_kv_dtype(asked, dtype, kv_dtype)
    if options.rounded_inputs is not None and not kept:
        raise ExportError(
            f"rounded inputs {options.rounded_inputs:g}: for matrices that are kept as a quantised "
            f"GGUF file has them, those of {source.path} are not. Leave it out."
        )
    matrices = dict(options.matrix_weights or {})
    check_matrix_forms(matrices, asked, source.architecture.kinds)
    check_block(options.graph_block, (asked, *matrices.values()))
    if asked in QUANTISED and asked != _DELICATE_FORM:
        matrices = dict.fromkeys(source.architecture.delicate_kinds, _DELICATE_FORM) | matrices
    return GraphForm(
        stored,
        get_codec(chosen),
        dtype,
        options.graph_block,
        kv_dtype=kv_dtype,
        matrices=matrices,
        rounded=options.rounded_inputs or 0.0,
        method=None if kept else method,
    )


def context_of(source: Checkpoint, form: GraphForm, asked: int | None) -> tuple[int, str | None]:
    """How many positions a text may have, and what to say where that is not the model's context.

    Raises ExportError for more than the model has.
    """
    most = source.spec.max_position_embeddings
    if asked is not None:
        if asked > most:
            raise ExportError(
                f"context {asked}: {source.path} is for {most} positions. Ask for that at most."
            )
        return asked, None
    values = source.architecture.rotary_values * np.dtype(compute_dtype(form.weights)).itemsize
    room = _ANGLES_BYTES // values
    if most <= room:
        return most, None
    context = 1 << room.bit_length() - 1
    return context, (
        f"context: {context:,} of the model's {most:,} positions, whose tables of angles would "
        f"take {most * values >> 20} MB of memory. Ask for more with --context."
    )


def check_calibration(form: GraphForm, text: str | None) -> None:
    """Refuse a calibration text that nothing would read."""
    if text is not None and form.method != "gptq" and not (form.kv_dtype == "int8" or form.rounded):
        raise ExportError(
            f"calibration text: graph weights {form.weights} by the method {form.method or 'none'} "
            "are not calibrated, nor are keys and values. Leave it out, or choose the graph method "
            "gptq or int8 keys and values."
        )


def _check_kv_dtype(graph_weights: str, dtype: str, kv_dtype: str | None) -> None:
    if kv_dtype == "float16" and dtype == "float32":
        raise ExportError(
            f"keys and values in {kv_dtype}: graph weights {graph_weights} compute in {dtype}. "
            f"Choose {dtype}."
        )
    if graph_weights == "fp32" and kv_dtype == "int8":
        raise ExportError(
            "keys and values in int8 with graph weights fp32: that form is the exact one, which "
            "the parity tests compare with. Choose fp16, int8 or int4."
        )


def _embedding(source: Checkpoint, form: GraphForm, asked: str | None) -> EmbeddingChoice:
    """How embeddings are stored, of which a dense model's table has nothing else."""
    spec = source.spec
    few_bits = not spec.memory.layers and form.weights not in ("fp16", "fp32")
    default = default_form(spec.hidden_size, form.embedding_dtype, few_bits=few_bits)
    rows = source.architecture.reference().rows()
    return choose_embedding(asked, default, source.embedding_grid, rows, spec.vocab_size)


def _memory_rows(source: Checkpoint, form: GraphForm, options: ExportOptions) -> RowsChoice:
    """How memory rows are stored, unless a target is to choose it for each layer."""
    if options.table_target is not None or source.architecture.row_table is None:
        return RowsChoice(form.codec)
    found = choose_rows(
        form.codec,
        source.row_grid,
        source.architecture.reference().rows(),
        source.spec.vocab_size,
        asked=options.table_codec is not None,
        dtype=form.embedding_dtype,
    )
    if found.stored is not None and options.table_search:
        raise ExportError(
            f"table search: the memory rows of {source.path} are kept as {found.codec.id}, as they "
            "are there, so no scales are searched for. Leave it out, or name another table codec."
        )
    return found


def record_layout(
    source: Checkpoint, form: GraphForm, alignment: int | None, embedding_codec: str | None = None
) -> RecordLayout:
    """The table's record layout; ExportError where width, codec and alignment do not fit."""
    memory = source.spec.memory
    if alignment is None:
        alignment = _ALIGNMENT if memory.layers else _DENSE_ALIGNMENT
    try:
        return RecordLayout(
            layers=memory.layers,
            width=memory.width,
            codec=form.codec,
            embedding_dtype=form.embedding_dtype,
            alignment=alignment,
            embedding_width=source.spec.hidden_size,
            embedding_codec=embedding_codec,
        )
    except ValueError as error:
        raise ExportError(f"{source.path}: {error}") from error


def check_target(source: Checkpoint, options: ExportOptions) -> None:
    """Refuse a target in size where nothing could be chosen for it."""
    target, table_codec = options.table_target, options.table_codec
    if target is None:
        return
    if table_codec is not None:
        raise ExportError(
            f"table codec {table_codec}, target {target}: expected one of the two. Name a codec, "
            "or a target in bits or bytes."
        )
    if not source.spec.memory.layers and options.graph_weights != "auto":
        raise ExportError(
            f"target {target}, graph weights {options.graph_weights}: {source.path} is a model "
            "without token memory (dense), whose matrices the target is for. Leave one of them out."
        )


def check_computation(device: str, compute_dtype: str, chunk: int | None) -> None:
    """Refuse a way of computing rows that does not exist here."""
    if device not in EXPORT_DEVICES:
        raise ExportError(f"device {device!r}, expected {' or '.join(EXPORT_DEVICES)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "device cuda: this torch finds no CUDA device. Install a CUDA build of torch, or "
            "export on the cpu."
        )
    if compute_dtype not in COMPUTE_DTYPES:
        raise ExportError(
            f"compute dtype {compute_dtype!r}, expected {' or '.join(COMPUTE_DTYPES)}."
        )
    if chunk is not None and chunk < 1:
        raise ExportError(f"chunk is {chunk}, expected at least one token.")


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how it was judged. Without verification there is no judgement."""

    path: Path
    manifest: Manifest
    rungs: tuple[ParityCheck, ...]
    quality: Quality | None
    mixed: MixedFigures | None = None
    matrices: Allocation | None = None  # of a graph whose matrices got forms of their own
    # What is left out, what was kept, what to know of the files for text.
    notes: tuple[str, ...] = ()


@called_with(ExportOptions)
def export_model(options: ExportOptions) -> ExportReport:
    """Export a checkpoint, a folder or a GGUF file, as an artifact folder.

    `graph_weights` is int2, int4, int8, fp16 or fp32; `table_codec` a word or id of docs/codecs.md
    (a dense model has no memory rows and always gets the codec `none`), None takes int8, or keeps
    the grid that a GGUF file has rows on; instead of it, `table_target` has the bits of each layer
    and class of tokens chosen for a size (docs/quantisation.md). `embedding_codec` stores the
    embeddings, by a word or id of the same page; None keeps the grid of a GGUF file where a codec
    holds it, takes int8-g32 beside a dense model's matrices of few bits, and what the graph is fed
    otherwise. `table_search` tries several scales for each group of values. A codec with parameters
    learns them from all rows, each as often as its token stands in `table_text` (None: all once; a
    target takes a text that comes along). `graph_block` weights of a matrix of few bits share a
    scale: 32, 64, 128 or 256 (int2: up to 128), None takes 128 for matrices of 1,024 columns or
    more and 32 below. `graph_method` is "rtn" or "gptq" (calibrated on `calibration_text`), None
    takes gptq; `matrix_weights` stores kinds of matrices in another form, {"lm_head": "int8"}: see
    docs/quantisation.md. `context` is how many positions a text may have: None takes the model's,
    or as many as 32 MiB of the tables of angles are for. `kv_dtype` of keys and values is the
    graph's own float, "float32" or "int8", whose steps are calibrated on `calibration_text` too.
    `rounded_inputs` is for GGUF files whose grids are kept: nats that inputs rounded to 8 bits may
    cost, which is faster; None rounds none. `device` (cpu or cuda), `compute_dtype` (float32 or
    bfloat16) and `chunk` (tokens at a time) say how the rows are computed. `verify` climbs the
    parity ladder and measures the loss of quality on `quality_text`; a loss beyond the bounds of
    `quality` is refused unless accepted. Two texts come along for those that are None: one that
    judges, and another for all that is fitted or planned. `progress(stage, done, total)` is called
    on the way.

    Raises ExportError, or RuntimeUnavailableError for a device that is not there; an artifact that
    was in OUT is untouched then. Nothing is left behind but an artifact whose loss is refused: it
    is OUT.refused, for whoever takes it as it is, unless `keep_refused` is False.
    """
    keep_to_quota()
    source = Checkpoint.open(Path(options.checkpoint))
    form = graph_form(source, options)
    context, limited = context_of(source, form, options.context)
    source = source.limited(context)
    check_calibration(form, options.calibration_text)
    text = judging_text() if options.quality_text is None else options.quality_text
    calibrated = f"{fitting_text()}\n{encyclopaedia_text()}"
    fitted = {
        "table text": options.table_text or fitting_text(),
        "calibration text": options.calibration_text or calibrated,
    }
    check_separate(text, fitted)
    check_computation(options.device, options.compute_dtype, options.chunk)
    memory = _memory_rows(source, form, options)
    form = replace(form, codec=memory.codec)
    embedding = _embedding(source, form, options.embedding_codec)
    layout = record_layout(source, form, options.alignment, embedding.form.codec.id)
    if options.table_target is None:
        check_table_options(layout, search=options.table_search, text=options.table_text)
    check_target(source, options)
    notes = (*source.architecture.notes, *check_text_files(source), *([limited] if limited else []))
    report = options.progress or (lambda stage, done, total: None)
    out = Path(os.path.abspath(options.out))
    with writing_artifact(out, overwrite=options.overwrite) as writer:
        dtype = getattr(torch, options.compute_dtype)
        rows = source.architecture.reference(options.device, dtype).rows(options.chunk)
        size, search = source.spec.vocab_size, options.table_search
        table = TableForm(layout, size, search, stored=embedding.stored, stored_rows=memory.stored)
        target, budget = options.table_target, None
        if target is not None and not layout.layers:
            budget = Budget(target, layout.table_bytes(size))
            target = None
        table = _complete_table(source, table, rows, target, options.table_text, report)
        form = replace(form, codec=table.layout.kinds[0].codec)  # all sections are fed alike
        export = _Export(source, form, table, writer, budget, report)
        manifest = export.write(rows, options.calibration_text)
        rungs: tuple[ParityCheck, ...] = ()
        quality = None
        if options.verify:
            try:
                rungs, quality = export.judge(
                    options.compute_dtype, text, options.accept_quality_loss
                )
            except _RefusedLossError as refusal:
                kept = writer.set_aside() if options.keep_refused else None
                raise _told(refusal, kept, out) from refusal
        writer.publish()
    notes = (
        *notes,
        *embedding.notes,
        *memory.notes,
        *export.notes,
        *_broken_promise(form, budget, quality),
    )
    return ExportReport(out, manifest, rungs, quality, table.figures, export.allocation, notes)


def _broken_promise(
    form: GraphForm, budget: Budget | None, quality: Quality | None
) -> tuple[str, ...]:
    """What to know of forms that were to keep a promise of quality and did not, if so."""
    planned = form.weights == "mixed" and form.method is not None and budget is None
    if not planned or quality is None or quality.perplexity_increase <= _PROMISED_INCREASE:
        return ()
    said = (
        f"perplexity is {quality.perplexity_increase:+.1%}, more than the {_PROMISED_INCREASE:.0%} "
        "that the default aims at. Ask for --graph-weights int8, or of a dense model for --bits."
    )
    return (said,)


def _complete_table(
    source: Checkpoint,
    form: TableForm,
    rows: Rows,
    target: Target | None,
    text: str | None,
    progress: Progress,
) -> TableForm:
    """The form with its codec, which a target has yet to find, and all that is to be learned.

    Raises ExportError for a text without the right tokenizer, a target that cannot be, and rows
    that are not finite.
    """
    if target is None:
        return learned(form, rows, None if text is None else _table_text(source, text), progress)
    exact = ExactModel(
        rows=rows,
        runtime=source.architecture.reference().runtime(),
        layout=replace(
            form.layout.with_codec(get_codec("f32")),
            embedding_dtype="float32",
            embedding_codec=None,
        ),
        context=source.spec.max_position_embeddings,
    )
    return mixed(form, target, exact, _table_text(source, text), progress)


def _table_text(source: Checkpoint, text: str | None) -> TableText:
    known = source.text_file(TOKENIZER_FILE)
    return table_text(known, text, source.spec.vocab_size, str(source.path))


class _RefusedLossError(ExportError):
    """The artifact is whole, and beyond the bounds of quality."""


def _told(refusal: ExportError, kept: Path | None, out: Path) -> ExportError:
    """The refusal, with where the artifact is now."""
    if kept is None:
        return refusal
    return ExportError(f"{refusal} It is kept as {kept}: rename it to {out.name}, or remove it.")


class _Export:
    """One export under way."""

    def __init__(
        self,
        source: Checkpoint,
        form: GraphForm,
        table: TableForm,
        writer: ArtifactWriter,
        budget: Budget | None,
        progress: Progress,
    ) -> None:
        self.allocation: Allocation | None = None
        self._budget = budget
        self._source = source
        self._form = form
        self._table = table
        self._writer = writer
        self._progress = progress
        self._kept: GridStore | None = None
        self._on_grids = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the graph that was written."""
        notes = []
        if self._kept is not None:
            notes.append(f"matrices of the file: {self._kept.summary}.")
        if self._on_grids:
            notes.append(f"matrices on grids of few bits, kept as they are: {self._on_grids}.")
        return tuple(notes)

    def write(self, rows: Rows, calibration_text: str | None) -> Manifest:
        """Write all files, the manifest last, and force them to the disk."""
        self._progress("identity", 0, 1)
        identity = self._source.identity()
        self._progress("identity", 1, 1)
        for name in TEXT_FILES:
            if (content := self._source.text_file(name)) is not None:
                self._writer.copy(name, BytesIO(content))
        if (vocabulary := vocabulary_file(self._source)) is not None:
            self._writer.copy(VOCABULARY_FILE, BytesIO(vocabulary))
        graph = self._write_graph(identity, calibration_text)
        table = self._writer.write_table(self._table, rows, TABLE_FILE, identity, self._progress)
        model = replace(self._source.spec, identity=identity)
        try:
            return self._writer.write_manifest(model, table, graph)
        except ArtifactError as error:
            raise ExportError(f"{self._source.path}: {error}") from error

    def judge(
        self, rows_dtype: str, text: str, accept_quality_loss: bool
    ) -> tuple[tuple[ParityCheck, ...], Quality | None]:
        """Reopen what was written, climb the ladder and measure quality; refuse what fails."""
        rungs: list[ParityCheck] = []
        reference = self._source.architecture.reference()
        with JudgedArtifact(self._writer.path, reference, own=True) as judged:
            for rung in parity_checks(judged, rows_dtype):
                _log.info("rung %d %s: %g of %g", rung.number, rung.name, rung.measured, rung.bound)
                if not rung.ok:
                    raise ExportError(rung.refusal(judged))
                rungs.append(rung)
                self._progress("ladder", rung.number, 6)
            return tuple(rungs), self._quality(judged, text, accept_quality_loss)

    def _quality(self, judged: JudgedArtifact, text: str, accept_loss: bool) -> Quality | None:
        if TOKENIZER_FILE not in self._writer.files:
            if accept_loss:
                return None
            raise ExportError(
                f"{self._source.path}: no tokenizer.json, so the loss of quality cannot be "
                "measured. Put the tokenizer there, or accept the loss unmeasured."
            )
        ids = text_tokens(judged, text, token_budget(self._source.parameters))
        if len(ids) < LEAST_TOKENS:
            if accept_loss:
                return None
            raise ExportError(
                f"The quality text gives {len(ids)} tokens, at least {LEAST_TOKENS} are needed: "
                "on fewer, chance says what is lost. Give a longer one, or accept the loss "
                "unmeasured."
            )
        quality = measure_quality(judged, ids, lambda *count: self._progress("quality", *count))
        if quality.text_acceptable or accept_loss:
            quality = with_answers(
                judged, quality, lambda *count: self._progress("answers", *count)
            )
        if quality.acceptable or accept_loss:
            return quality
        raise _RefusedLossError(
            f"Graph weights {self._form.weights} and table codec {self._table.layout.codec_id} "
            f"{quality.losses} {remedy(judged, ids, quality.mean_kl)} Or accept the loss of "
            "quality."
        )

    def _write_graph(self, identity: str, calibration_text: str | None) -> GraphSpec:
        steps = self._source.spec.num_hidden_layers + 1
        self._progress("graph", 0, steps)
        int8 = self._form.kv_dtype == "int8"
        scales = kv_scales(self._source, calibration_text) if int8 else None
        matrices = graph_matrices(
            self._source,
            self._form,
            calibration_text,
            self._budget,
            self._writer.path,
            self._progress,
        )
        self.allocation = matrices.allocation
        spec, form = self._source.spec, self._form
        build, store = matrices.architecture.build, matrices.store
        model = build_graph(spec, build, form, identity, scales, store)
        self._kept, self._on_grids = matrices.kept, matrices.on_grids
        names = save_graph(model, self._writer.path)
        # Nodes and values refer to each other: their weights would stay until some later sweep.
        del model
        gc.collect()
        for name in names:
            self._writer.seal(name)
        self._progress("graph", steps, steps)
        dtype = compute_dtype(self._form.weights)
        return GraphSpec(
            file=GRAPH_FILE,
            external_data=EXTERNAL_FILE if EXTERNAL_FILE in names else None,
            weights=named_form(self._form.weights, self._form.matrices),
            compute_dtype=dtype,
            kv_dtype=self._form.kv_dtype or dtype,
            wire=self._form.codec.wire,
            opset=OPSET,
        )
