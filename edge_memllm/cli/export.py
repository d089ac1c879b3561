"""``edge-memllm export`` and ``requantize``: an artifact of a checkpoint, or of another artifact.

Both are judged before they appear; the pages here say how that went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from edge_memllm.artifact.manifest import TableSpec
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import (
    StageBars,
    byte_count,
    number,
    table,
    table_codecs,
    write_json,
)
from edge_memllm.errors import missing_extra
from edge_memllm.hub import artifact_folder, checkpoint_folder
from edge_memllm.memory_plan import graph_file_bytes
from edge_memllm.mixed_precision import Target
from edge_memllm.options import Group, Option, byte_size, keywords, positive_number
from edge_memllm.options.export import ExportOptions, RequantizeOptions

if TYPE_CHECKING:
    from edge_memllm_export import Answers, ExportReport, ParityCheck, Quality, RequantizeReport
    from edge_memllm_export.table import MixedFigures
    from edge_memllm_export.weights.allocation import Allocation
    from edge_memllm_export.weights.forms import MatrixForm

_DEAREST = 5  # matrices that are named because they do most of the damage

_EXPORT = """\
Export a checkpoint as an artifact: graph, table, tokenizer and manifest. It is a folder with
config.json, model.safetensors and tokenizer.json, a name of the Hugging Face Hub, or a GGUF file;
its model one of MemoryLLM, a dense one of the family of Llama (SmolLM, TinyLlama), Mistral, Qwen2
and Qwen3, or Gemma 3, 3n and 4, of which only the text is taken. The result is judged before it
appears: six rungs compare it with the checkpoint, and its loss of quality is measured on real text
and on what it answers to a dozen prompts. A rung that does not hold, or a loss beyond the bounds,
ends the export, and OUT is not made: what costs too much is kept as OUT.refused. Exporting the same
checkpoint again gives the same bytes."""

_EXPORT_EXAMPLES = """\
  edge-memllm export checkpoint artifact
  edge-memllm export SmolLM2-135M-Instruct.Q4_1.gguf artifact
  edge-memllm export checkpoint exact --graph-weights fp32 --table-codec f32
  edge-memllm export checkpoint small --table-codec int4 --accept-quality-loss
  edge-memllm export checkpoint smaller --table-codec codebook3 --accept-quality-loss
  edge-memllm export checkpoint fitting --bits 4.5 --table-text texts.txt
  edge-memllm export checkpoint better --graph-weights int4 --matrix-weights lm_head=int8
  edge-memllm export checkpoint long --kv-dtype int8
  edge-memllm export checkpoint artifact --overwrite --json > report.json"""

_REQUANTIZE = """\
Write an artifact once more with its table in another codec. Neither the checkpoint nor torch is
needed. An f16 or f32 table is the best source: rows of a quantised one keep the error they have.
The graph stays as it is, but for the part that takes in the rows where the new codec is fed in
another form. The result is compared with the source before it appears."""

_REQUANTIZE_EXAMPLES = """\
  edge-memllm requantize artifact small --table-codec int4
  edge-memllm requantize artifact smaller --table-codec int3 --table-search
  edge-memllm requantize full fitting --target-size 1.5GB --table-text texts.txt"""


def _bits(more: str = "") -> Option:
    return Option(
        "mixed precision: choose the bits of each layer and class of tokens so that memory values "
        f"take this many on average, scales and levels included, such as 4.5{more}",
        metavar="BITS",
        parse=positive_number,
        one_of="table",
    )


def _target_size(more: str = "") -> Option:
    return Option(
        f"mixed precision: the same for a size of the table file, such as 1.5GB{more}",
        parse=byte_size,
        one_of="table",
    )


@dataclass(frozen=True, kw_only=True)
class MixedOptions:
    """What mixed precision is to come to, instead of a codec: one of the two."""

    bits: Annotated[float | None, _bits()] = None
    target_size: Annotated[int | None, _target_size()] = None

    @property
    def target(self) -> Target | None:
        """The same as the library takes it; None where a codec was asked for."""
        if self.bits is None and self.target_size is None:
            return None
        return Target(self.bits, self.target_size)


@dataclass(frozen=True, kw_only=True)
class ExportMixedOptions(MixedOptions):
    """The same of an export, which has matrices to choose for where there is no memory."""

    bits: Annotated[
        float | None, _bits("; of a model without memory, those of each matrix of the graph")
    ] = None
    target_size: Annotated[
        int | None, _target_size("; of a model without memory, of table and graph together")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """What may be asked of ``edge-memllm export``."""

    export: Annotated[ExportOptions, Group()]
    mixed: Annotated[ExportMixedOptions, Group()]
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class RequantizeCommand:
    """What may be asked of ``edge-memllm requantize``."""

    requantize: Annotated[RequantizeOptions, Group()]
    mixed: Annotated[MixedOptions, Group()]
    json: Json = False


def export(asked: ExportCommand) -> int:
    """Run ``edge-memllm export``."""
    try:
        from edge_memllm_export import export_model
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    checkpoint = checkpoint_folder(asked.export.checkpoint)
    target = asked.mixed.target
    with StageBars() as bars:
        options = replace(asked.export, checkpoint=checkpoint, table_target=target, progress=bars)
        report = export_model(**keywords(options))
    if asked.json:
        write_json(as_dict(report))
    else:
        print(page(report))
    return 0


def requantize(asked: RequantizeCommand) -> int:
    """Run ``edge-memllm requantize``."""
    try:
        from edge_memllm_export import requantize
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "onnx_ir", "export") from error
    source = artifact_folder(asked.requantize.artifact)
    with StageBars() as bars:
        options = replace(
            asked.requantize, artifact=source, table_target=asked.mixed.target, progress=bars
        )
        report = requantize(**keywords(options))
    if asked.json:
        write_json({**asdict(report), "path": str(report.path)})
    else:
        print(_requantize_page(report))
    return 0


def as_dict(report: ExportReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "artifact": str(report.path),
        "verified": bool(report.rungs),
        "rungs": [asdict(rung) | {"ok": rung.ok} for rung in report.rungs],
        "quality": _quality_dict(report.quality),
        "mixed": None if report.mixed is None else asdict(report.mixed),
        "matrices": None if report.matrices is None else _matrices_dict(report.matrices),
        "notes": list(report.notes),
        "manifest": asdict(report.manifest),
    }


def page(report: ExportReport) -> str:
    """The report as people read it."""
    manifest = report.manifest
    graph, stored, files = manifest.graph, manifest.table, manifest.files
    table_size = f"{table_codecs(stored)}, {byte_count(files[stored.file].bytes)}"
    rows = [
        ("artifact", str(report.path)),
        ("graph", f"{graph.weights}, {byte_count(graph_file_bytes(manifest))}"),
        ("table", f"{table_size}, {_record_size(stored)} per token"),
    ]
    if report.mixed is not None:
        rows.append(("mixed", _mixed_line(report.mixed)))
    parts = [table(rows)]
    if report.matrices is not None:
        parts.append(_matrices_page(report.matrices))
    if report.rungs:
        parts.append(rung_table(report.rungs))
    else:
        parts.append("NOT VERIFIED: nothing was compared with the checkpoint (--no-verify).")
    if report.quality is not None:
        parts.append(_quality_line(report.quality))
        if report.quality.answers is not None:
            parts.append(_answer_lines(report.quality.answers))
    parts += [f"note: {each}" for each in report.notes]
    return "\n\n".join(parts)


def _matrices_page(allocation: Allocation) -> str:
    """The forms of a graph's matrices, and which of these do most of the damage."""
    forms = Counter(each.form for each in allocation.chosen.values())
    total = allocation.damage or 1.0
    costs: dict[MatrixForm, float] = dict.fromkeys(forms, 0.0)
    for each in allocation.chosen.values():
        costs[each.form] += each.damage
    rows: list[tuple[str, ...]] = [
        ("matrices", "bits", "block", "zero points", "level", "share of the damage")
    ]
    for form, count in sorted(forms.items(), key=lambda item: (item[0].bits, item[0].block)):
        rows.append((*_form_cells(str(count), form), f"{costs[form] / total:.0%}"))
    shares = allocation.shares()
    for name in sorted(shares, key=lambda name: -shares[name])[:_DEAREST]:
        cells = _form_cells(name.removesuffix(".weight"), allocation.chosen[name].form)
        rows.append((*cells, f"{shares[name]:.1%}"))
    said = f"expected divergence of all matrices: {allocation.damage:.2g} nats; --json lists each"
    return f"{table(rows)}\n{said}"


def _form_cells(name: str, form: MatrixForm) -> tuple[str, ...]:
    zero = "yes" if form.zero_points else "no"
    return name, str(form.bits), str(form.block), zero, str(form.level)


def _matrices_dict(allocation: Allocation) -> dict[str, Any]:
    """Bits, level, bytes and damage of each matrix."""
    return {
        name: {**asdict(each.form), "bytes": each.stored, "damage": each.damage}
        for name, each in allocation.chosen.items()
    }


def _requantize_page(report: RequantizeReport) -> str:
    """The report as people read it."""
    stored = report.manifest.table
    size = byte_count(report.manifest.files[stored.file].bytes)
    rows = [
        ("artifact", str(report.path)),
        ("table", f"{table_codecs(stored)}, {size}, {_record_size(stored)} per token"),
        ("graph", "rows taken in another way" if report.graph_rewired else "as it was"),
        (
            "compared",
            (
                f"mean KL divergence {report.mean_kl:.4f} nats to the source over "
                f"{report.compared_tokens} tokens"
            ),
        ),
    ]
    if report.mixed is not None:
        rows.append(("mixed", _mixed_line(report.mixed)))
    if not report.faithful_source:
        rows.append(
            ("note", f"made from {report.source_codec}: the error of that codec stays in the rows")
        )
    return table(rows)


def _record_size(stored: TableSpec) -> str:
    """The bytes of a record as people read them."""
    most = "" if stored.classes is None else "up to "
    return f"{most}{byte_count(stored.record_bytes)}"


def _mixed_line(mixed: MixedFigures) -> str:
    """What mixed precision came to, in one line."""
    return (
        f"{mixed.taken} (target: {mixed.target}); of the table alone, mean KL divergence "
        f"{mixed.measured_kl:.2g} nats (expected: {mixed.predicted_kl:.2g}) over "
        f"{number(mixed.compared_tokens)} tokens of {mixed.text}"
    )


def rung_table(rungs: Sequence[ParityCheck]) -> str:
    """One line per rung of the parity ladder."""
    rows = [("", "rung", "measured", "bound", "")]
    for rung in rungs:
        verdict = "ok" if rung.ok else "FAILED"
        figures = (f"{rung.measured:.3g}", f"{rung.bound:.3g}")
        rows.append((verdict, f"{rung.number} {rung.name}", *figures, rung.note))
    return table(rows)


def _quality_line(quality: Quality) -> str:
    """What quantisation costs, in one line."""
    return (
        f"quality: perplexity {quality.checkpoint_perplexity:.3f} -> "
        f"{quality.artifact_perplexity:.3f} ({quality.perplexity_increase:+.2%}), "
        f"mean KL divergence {quality.mean_kl:.4f} nats over {number(quality.tokens)} tokens"
    )


def _answer_lines(answers: Answers) -> str:
    """How the checkpoint sees what the artifact answers."""
    told = (
        f"answers: of {answers.tokens} tokens to {answers.prompts} prompts the checkpoint would "
        f"have taken another in {answers.others}, twice as likely in {answers.unlikely}; mean KL "
        f"divergence {answers.mean_kl:.4f} nats"
    )
    turns = [
        f"  {turn.prompt} {turn.written!r} goes on {turn.chosen!r} ({turn.chosen_probability:.1%} "
        f"in the checkpoint), not {turn.expected!r} ({turn.expected_probability:.1%})"
        for turn in answers.turns
    ]
    return "\n".join([told, *turns])


def _quality_dict(quality: Quality | None) -> dict[str, Any] | None:
    """Quality as plain data."""
    if quality is None:
        return None
    return asdict(quality) | {"perplexity_increase": quality.perplexity_increase}


def interrupted(_: ExportCommand | RequantizeCommand) -> str:
    """Say what Ctrl-C leaves of an artifact."""
    return "Stopped: no artifact was written, and none replaced. The same command begins anew."


EXPORT = Command(ExportCommand, export, _EXPORT, _EXPORT_EXAMPLES, interrupted)
REQUANTIZE = Command(RequantizeCommand, requantize, _REQUANTIZE, _REQUANTIZE_EXAMPLES, interrupted)
