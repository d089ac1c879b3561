"""``edge-memllm export``: a checkpoint in, an artifact out, judged against the checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.options import add_command, add_json, add_targets, positive_int, target
from edge_memllm.cli.output import byte_count, number, read_text, table, write_json
from edge_memllm.errors import missing_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_memllm.artifact.manifest import TableSpec
    from edge_memllm.cli.options import Commands
    from edge_memllm_export import ExportReport, Quality, Rung
    from edge_memllm_export.table import MixedFigures

GRAPH_WEIGHTS = ("fp32", "fp16", "int8", "int4")
TABLE_CODECS = (
    *("f32", "f16", "bf16", "fp8", "int8", "nested8", "int6", "int5", "int4", "int4a"),
    *("nf4", "codebook4", "int3", "codebook3", "int2", "codebook2", "lowrank-50"),
)
GRAPH_METHODS = ("rtn", "gptq")
KV_DTYPES = ("float16", "float32", "int8")

DESCRIPTION = """\
Export a checkpoint (a folder with config.json, model.safetensors and tokenizer.json) as an
artifact: graph, table, tokenizer and manifest. The result is judged before it appears: six rungs
compare it with the checkpoint, and its loss of quality is measured on real text. A rung that does
not hold, or a loss beyond the bounds, ends the export, and OUT is not made. Exporting the same
checkpoint again gives the same bytes."""

_EXAMPLES = """\
  edge-memllm export checkpoint artifact
  edge-memllm export checkpoint exact --graph-weights fp32 --table-codec f32
  edge-memllm export checkpoint small --table-codec int4 --accept-quality-loss
  edge-memllm export checkpoint smaller --table-codec codebook3 --accept-quality-loss
  edge-memllm export checkpoint fitting --bits 4.5 --table-text texts.txt
  edge-memllm export checkpoint better --matrix-weights lm_head=int8
  edge-memllm export checkpoint long --kv-dtype int8
  edge-memllm export checkpoint artifact --overwrite --json > report.json"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "export",
        execute,
        summary="make an artifact from a checkpoint",
        description=DESCRIPTION,
        examples=_EXAMPLES,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options: Optimum's command line has the same command."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a trained model")
    parser.add_argument("out", type=Path, metavar="OUT", help="the artifact to make")
    parser.add_argument(
        "--graph-weights",
        choices=GRAPH_WEIGHTS,
        default="int4",
        help="how the graph stores its matrices (default: int4)",
    )
    parser.add_argument(
        "--matrix-weights",
        action=_MatrixWeights,
        metavar="NAME=FORM,...",
        help="store some matrices of an int4 or int8 graph in the other form, such as "
        "lm_head=int8: qkv_proj, o_proj, gate_up_proj, down_proj, projections, lm_head",
    )
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument(
        "--table-codec",
        metavar="CODEC",
        help=f"how the table stores its rows: {', '.join(TABLE_CODECS)} or another share of the "
        "rank, or an id with a group size such as int4-g64 (default: int8)",
    )
    add_targets(stored)
    parser.add_argument(
        "--graph-block",
        type=positive_int,
        metavar="N",
        help="weights of an int4 or int8 matrix that share a scale: 32, 64, 128 or 256; more is "
        "faster and less exact (default: 128 from 1,024 columns on, else 32)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="keys and values; int8 halves their memory, makes decoding of long texts faster and "
        "prefill slower (default: what the graph computes in)",
    )
    parser.add_argument(
        "--alignment",
        type=positive_int,
        default=512,
        metavar="BYTES",
        help="records start at multiples of this: 512 to 65536 (default: 512)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the artifact in OUT")
    add_json(parser)
    _add_rounding(parser)
    _add_table(parser)
    _add_rows(parser)
    _add_judgement(parser)


def _add_rounding(parser: argparse.ArgumentParser) -> None:
    rounding = parser.add_argument_group("rounding the graph's matrices")
    rounding.add_argument(
        "--graph-method",
        choices=GRAPH_METHODS,
        help="rtn rounds every weight to nearest; gptq makes up for the error by what the model "
        "feeds the matrix on a text (default: gptq for int4, rtn for int8)",
    )
    rounding.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="text for gptq and for int8 keys and values, best one like those the model is for "
        "(default: prose that comes along)",
    )


class _MatrixWeights(argparse.Action):
    """Gather "lm_head=int8,o_proj=int8" of one or several options into one mapping."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        forms: dict[str, str] = dict(getattr(namespace, self.dest) or {})
        for part in values.split(","):
            name, equals, form = part.partition("=")
            if not (name and equals and form):
                raise argparse.ArgumentError(self, f"{part!r} is not of the form lm_head=int8")
            if name in forms:
                raise argparse.ArgumentError(self, f"{name} is there twice")
            forms[name] = form
        setattr(namespace, self.dest, forms)


def _add_table(parser: argparse.ArgumentParser) -> None:
    stored = parser.add_argument_group("storing the table")
    stored.add_argument(
        "--table-search",
        action="store_true",
        help="try several scales for each group and keep the one with the smallest squared error; "
        "for codecs of 4 bits or less, takes longer",
    )
    stored.add_argument(
        "--table-text",
        type=Path,
        metavar="FILE",
        help="codecs that learn from all rows (codebook, lowrank) count each token as often as "
        "this text has it (default: all tokens once); for --bits and --target-size, a text like "
        "those the model is for (default: prose that comes along)",
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    rows = parser.add_argument_group("computing the table")
    rows.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)"
    )
    rows.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="in which arithmetic (default: float32)",
    )
    rows.add_argument(
        "--chunk",
        type=positive_int,
        metavar="N",
        help="N tokens at a time: less takes less memory (default: by the model's size)",
    )


def _add_judgement(parser: argparse.ArgumentParser) -> None:
    judgement = parser.add_argument_group("judging the result")
    judgement.add_argument(
        "--quality-text",
        type=Path,
        metavar="FILE",
        help="measure the loss of quality on this text, which may not be one of the others "
        "(default: prose that comes along, other than theirs)",
    )
    judgement.add_argument(
        "--accept-quality-loss",
        action="store_true",
        help="make the artifact even if its loss of quality is beyond the bounds",
    )
    judgement.add_argument(
        "--no-verify",
        action="store_true",
        help="compare nothing with the checkpoint; the report says so",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    try:
        from edge_memllm_export import export_model
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    from edge_memllm.cli.output import StageBars
    from edge_memllm.hub import checkpoint_folder

    text, counted = arguments.quality_text, arguments.table_text
    calibrated = arguments.calibration_text
    with StageBars() as bars:
        report = export_model(
            checkpoint_folder(arguments.checkpoint),
            arguments.out,
            graph_weights=arguments.graph_weights,
            table_codec=arguments.table_codec,
            table_target=target(arguments),
            table_search=arguments.table_search,
            table_text=read_text(counted) if counted else None,
            device=arguments.device,
            graph_block=arguments.graph_block,
            graph_method=arguments.graph_method,
            matrix_weights=arguments.matrix_weights,
            calibration_text=read_text(calibrated) if calibrated else None,
            kv_dtype=arguments.kv_dtype,
            alignment=arguments.alignment,
            compute_dtype=arguments.compute_dtype,
            chunk=arguments.chunk,
            verify=not arguments.no_verify,
            accept_quality_loss=arguments.accept_quality_loss,
            quality_text=read_text(text) if text else None,
            overwrite=arguments.overwrite,
            progress=bars,
        )
    if arguments.json:
        write_json(as_dict(report))
    else:
        print(page(report))
    return 0


def as_dict(report: ExportReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "artifact": str(report.path),
        "verified": bool(report.rungs),
        "rungs": [asdict(rung) | {"ok": rung.ok} for rung in report.rungs],
        "quality": quality_dict(report.quality),
        "mixed": None if report.mixed is None else asdict(report.mixed),
        "notes": list(report.notes),
        "manifest": asdict(report.manifest),
    }


def page(report: ExportReport) -> str:
    """The report as people read it."""
    from edge_memllm.memory_plan import graph_file_bytes

    manifest = report.manifest
    graph, stored, files = manifest.graph, manifest.table, manifest.files
    table_size = f"{stored.codec}, {byte_count(files[stored.file].bytes)}"
    rows = [
        ("artifact", str(report.path)),
        ("graph", f"{graph.weights}, {byte_count(graph_file_bytes(manifest))}"),
        ("table", f"{table_size}, {record_size(stored)} per token"),
    ]
    if report.mixed is not None:
        rows.append(("mixed", mixed_line(report.mixed)))
    parts = [table(rows)]
    if report.rungs:
        parts.append(rung_table(report.rungs))
    else:
        parts.append("NOT VERIFIED: nothing was compared with the checkpoint (--no-verify).")
    if report.quality is not None:
        parts.append(quality_line(report.quality))
    parts += [f"note: {each}" for each in report.notes]
    return "\n\n".join(parts)


def record_size(stored: TableSpec) -> str:
    """The bytes of a record as people read them."""
    most = "" if stored.classes is None else "up to "
    return f"{most}{byte_count(stored.record_bytes)}"


def mixed_line(mixed: MixedFigures) -> str:
    """What mixed precision came to, in one line."""
    return (
        f"{mixed.taken} (target: {mixed.target}); of the table alone, mean KL divergence "
        f"{mixed.measured_kl:.2g} nats (expected: {mixed.predicted_kl:.2g}) over "
        f"{number(mixed.compared_tokens)} tokens of {mixed.text}"
    )


def rung_table(rungs: Sequence[Rung]) -> str:
    """One line per rung of the parity ladder."""
    rows = [("", "rung", "measured", "bound", "")]
    for rung in rungs:
        verdict = "ok" if rung.ok else "FAILED"
        figures = (f"{rung.measured:.3g}", f"{rung.bound:.3g}")
        rows.append((verdict, f"{rung.number} {rung.name}", *figures, rung.note))
    return table(rows)


def quality_line(quality: Quality) -> str:
    """What quantisation costs, in one line."""
    return (
        f"quality: perplexity {quality.checkpoint_perplexity:.3f} -> "
        f"{quality.artifact_perplexity:.3f} ({quality.perplexity_increase:+.2%}), "
        f"mean KL divergence {quality.mean_kl:.4f} nats over {number(quality.tokens)} tokens"
    )


def quality_dict(quality: Quality | None) -> dict[str, Any] | None:
    """Quality as plain data."""
    if quality is None:
        return None
    return asdict(quality) | {"perplexity_increase": quality.perplexity_increase}
