"""What may be asked of an export and of a requantisation.

They stand in the core, and not beside what does the work, because the command line shows them where
the packages are missing that the work needs.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from edge_memllm.artifact.manifest import KVDtype, UniformWeights
from edge_memllm.codecs import CODEC_WORDS
from edge_memllm.errors import RequestError
from edge_memllm.mixed_precision import Target
from edge_memllm.options import Option, closed_choices, positive_int, positive_number
from edge_memllm.progress import Progress

GraphWeights: TypeAlias = Literal["auto"] | UniformWeights
GraphMethod: TypeAlias = Literal["rtn", "gptq"]
ExportDevice: TypeAlias = Literal["cpu", "cuda"]
ComputeDtype: TypeAlias = Literal["float32", "bfloat16"]
GRAPH_FORMS = closed_choices(GraphWeights)
GRAPH_METHODS = closed_choices(GraphMethod)
EXPORT_DEVICES = closed_choices(ExportDevice)
COMPUTE_DTYPES = closed_choices(ComputeDtype)

_ROUNDING = "rounding the graph's matrices"
_TABLE = "storing the table"
_ROWS = "computing the table"
_JUDGEMENT = "judging the result"


def matrix_forms(text: str) -> tuple[tuple[str, str], ...]:
    """Parse forms of kinds of matrices, as ``lm_head=int8,o_proj=int8``."""
    forms: dict[str, str] = {}
    for part in text.split(","):
        name, equals, form = part.partition("=")
        if not (name and equals and form):
            raise ArgumentTypeError(f"{part!r} is not of the form lm_head=int8")
        if name in forms:
            raise ArgumentTypeError(f"{name} is there twice")
        forms[name] = form
    return tuple(forms.items())


def all_forms(forms: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Gather what several options say. Raises `RequestError` for a kind that is there twice."""
    found: dict[str, str] = {}
    for name, form in forms:
        if name in found:
            raise RequestError(f"--matrix-weights: {name} is there twice. Name it once.")
        found[name] = form
    return found


# What both have. The command line has other words for the target that is there instead of a codec.
_TableSearch = Annotated[
    bool,
    Option(
        "try several scales for each group and keep the one with the smallest squared error; for "
        "codecs of 4 bits or less, takes longer",
        group=_TABLE,
    ),
]
_TableText = Annotated[
    str | None,
    Option(
        "codecs that learn from all rows (codebook, lowrank) count each token as often as this "
        "text has it (default: all tokens once); for --bits and --target-size, a text like those "
        "the model is for (default: prose that comes along)",
        reads_text=True,
        group=_TABLE,
    ),
]
_Overwrite = Annotated[bool, Option("replace the artifact in OUT")]


@dataclass(frozen=True)
class RequantizeOptions:
    """What may be asked of `requantize`, which says what each of them does."""

    artifact: Annotated[Path, Option("an exported model")]
    out: Annotated[Path, Option("the artifact to make")]
    _: KW_ONLY
    table_search: _TableSearch = False
    table_text: _TableText = None
    overwrite: _Overwrite = False
    table_codec: Annotated[
        str | None,
        Option(
            "how the new table stores its rows; docs/codecs.md lists them",
            metavar="CODEC",
            one_of="table",
            required=True,
        ),
    ] = None
    table_target: Target | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class ExportOptions:
    """What may be asked of `export_model`, which says what each of them does."""

    checkpoint: Annotated[Path, Option("a trained model: a folder or a GGUF file")]
    out: Annotated[Path, Option("the artifact to make")]
    _: KW_ONLY
    graph_weights: Annotated[GraphWeights, Option("how the graph stores its matrices")] = "auto"
    matrix_weights: Annotated[
        Mapping[str, str] | None,
        Option(
            "store some matrices of an int2, int4 or int8 graph in another of these forms, such as "
            "lm_head=int8: qkv_proj, o_proj, gate_up_proj, down_proj, lm_head, and of Gemma 3n and "
            "4 q_proj, per_layer_model_projection, per_layer_input_gate, per_layer_projection, of "
            "3n altup_projections, linear_left, linear_right and altup_unembed_projections too",
            metavar="NAME=FORM,...",
            parse=matrix_forms,
            several="list",
            collect=all_forms,
        ),
    ] = None
    graph_block: Annotated[
        int | None,
        Option(
            "weights of a matrix of few bits that share a scale: 32, 64, 128 or, but for int2, "
            "256; more is faster and less exact",
            parse=positive_int,
            unset="128 from 1,024 columns on, else 32",
        ),
    ] = None
    kv_dtype: Annotated[
        KVDtype | None,
        Option(
            "keys and values; int8 halves their memory, makes decoding of long texts faster and "
            "costs some exactness; float32 doubles it and makes long texts faster on a CPU",
            unset="what the graph computes in",
        ),
    ] = None
    context: Annotated[
        int | None,
        Option(
            "positions that a text may have; less makes the tables of angles smaller",
            parse=positive_int,
            metavar="POSITIONS",
            unset="the model's, or what 32 MiB of those tables are for",
        ),
    ] = None
    alignment: Annotated[
        int | None,
        Option(
            "records start at multiples of this: 64 to 65536",
            parse=positive_int,
            metavar="BYTES",
            unset="of models with memory 512, of dense ones 64",
        ),
    ] = None
    overwrite: _Overwrite = False
    graph_method: Annotated[
        GraphMethod | None,
        Option(
            "rtn rounds every weight to nearest; gptq makes up for the error by what the model "
            "feeds the matrix on a text",
            unset="gptq",
            group=_ROUNDING,
        ),
    ] = None
    calibration_text: Annotated[
        str | None,
        Option(
            "text for gptq and for int8 keys and values, best one like those the model is for",
            reads_text=True,
            unset="prose that comes along",
            group=_ROUNDING,
        ),
    ] = None
    rounded_inputs: Annotated[
        float | None,
        Option(
            "where the matrices of a GGUF file are kept as they are: what rounding the inputs of "
            "some of them to 8 bits may cost, such as 0.001, which is faster",
            metavar="NATS",
            parse=positive_number,
            unset="none are rounded",
            group=_ROUNDING,
        ),
    ] = None
    table_search: _TableSearch = False
    table_text: _TableText = None
    embedding_codec: Annotated[
        str | None,
        Option(
            "how the table stores embeddings: the same words and ids, but for those that learn; a "
            "GGUF file's blocks are kept where they can be",
            metavar="CODEC",
            unset="int8-g32 for dense models in 8 bits or less, else what the graph computes in",
            group=_TABLE,
        ),
    ] = None
    device: Annotated[ExportDevice, Option("where", group=_ROWS)] = "cpu"
    compute_dtype: Annotated[ComputeDtype, Option("in which arithmetic", group=_ROWS)] = "float32"
    chunk: Annotated[
        int | None,
        Option(
            "N tokens at a time: less takes less memory",
            parse=positive_int,
            unset="by the model's size",
            group=_ROWS,
        ),
    ] = None
    verify: Annotated[
        bool,
        Option(
            "compare nothing with the checkpoint; the report says so",
            flag="--no-verify",
            group=_JUDGEMENT,
        ),
    ] = True
    accept_quality_loss: Annotated[
        bool,
        Option(
            "make the artifact even if its loss of quality is beyond the bounds", group=_JUDGEMENT
        ),
    ] = False
    keep_refused: Annotated[
        bool,
        Option(
            "leave nothing behind of an artifact whose loss is beyond the bounds (else it is there "
            "as OUT.refused, and can be renamed)",
            flag="--discard-refused",
            group=_JUDGEMENT,
        ),
    ] = True
    quality_text: Annotated[
        str | None,
        Option(
            "measure the loss of quality on this text, which may not be one of the others",
            reads_text=True,
            unset="prose that comes along, other than theirs",
            group=_JUDGEMENT,
        ),
    ] = None
    table_codec: Annotated[
        str | None,
        Option(
            f"how the table stores its rows: {', '.join(CODEC_WORDS)}, lowrank-50 or another share "
            "of the rank, or an id with a group size such as int4-g64; rows of Gemma 3n and 4 "
            "stay as a GGUF file has them where they can be",
            metavar="CODEC",
            unset="int8",
            one_of="table",
        ),
    ] = None
    table_target: Target | None = None
    progress: Progress | None = None
