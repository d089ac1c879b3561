"""``edge-memllm demo``: the shipped model, from checkpoint to text, and its figures."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import edge_memllm
from edge_memllm.cli.export import page
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import StageBars, byte_count, number, table, write_json
from edge_memllm.errors import ArtifactError, missing_extra
from edge_memllm.model import Model
from edge_memllm.options import Option
from edge_memllm.sampling import Sampling

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny-english"
PROMPTS = (
    "The history of the city",
    "It was a cold evening, and the old man",
    "The river flows through",
)
_SEED = 1
_NEW_TOKENS = 80

_DESCRIPTION = """\
Export the small model that comes with the repository, generate from three prompts with its table
read from storage record by record, and show how little of the table that took. Needs the export
extra; the artifact goes into a temporary folder unless --out keeps it."""

_EXAMPLES = """\
  edge-memllm demo
  edge-memllm demo --out artifact && edge-memllm run artifact"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text, and what reading its rows took."""

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float
    record_bytes_per_token: float  # read from the table for each token after the first


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What may be asked of ``edge-memllm demo``."""

    checkpoint: Annotated[
        Path, Option("another checkpoint than the one that comes along", metavar="DIR", unset="")
    ] = SHIPPED
    out: Annotated[Path | None, Option("keep the artifact here", metavar="ARTIFACT")] = None
    overwrite: Annotated[bool, Option("replace the artifact in --out")] = False
    json: Json = False


def execute(options: DemoOptions) -> int:
    """Run the command."""
    if not (options.checkpoint / "config.json").is_file():
        raise ArtifactError(
            f"{options.checkpoint}: holds no checkpoint. The demo's model comes with the "
            "repository, not with the installed package: clone it and run 'make demo' there, or "
            "name a checkpoint with --checkpoint."
        )
    show = not options.json
    with ExitStack() as stack:
        out = options.out
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "artifact"
        _say(show, f"1. Export: {options.checkpoint.name} becomes a graph and a table\n")
        _export(options.checkpoint, out, options.overwrite, show)
        model = stack.enter_context(edge_memllm.load(out, device="cpu", reader="pread"))
        _say(show, "\n2. Run: three prompts, each token's record read from storage\n")
        samples = [_sample(model, prompt, show) for prompt in PROMPTS]
        figures = _figures(model, samples)
        if options.json:
            write_json({"samples": [asdict(sample) for sample in samples], "figures": figures})
        else:
            print(f"3. What that took\n\n{_page(figures)}")
            if options.out is not None:
                print(f"\nGo on with it: {_program()} run {options.out}")
                print(f"In a browser:  {_program()} serve {options.out}")
    return 0


def _export(checkpoint: Path, out: Path, overwrite: bool, show: bool) -> None:
    try:
        from edge_memllm_export import export_model
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    with StageBars() as bars:
        report = export_model(checkpoint, out, overwrite=overwrite, progress=bars)
    _say(show, page(report))


def _sample(model: Model, prompt: str, show: bool) -> Sample:
    """Generate one text. The table's own counters say what its decoding read."""
    sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    stream = model.stream(prompt, max_new_tokens=_NEW_TOKENS, sampling=sampling, seed=_SEED)
    _say(show, f"  {prompt}", end="")
    first = next(stream)
    before = model.table.statistics.bytes_read
    _say(show, first.text, end="")
    text, last = first.text, first
    for last in stream:
        text += last.text
        _say(show, last.text, end="")
    _say(show, "\n")
    statistics = last.statistics
    assert statistics is not None
    decoded = statistics.completion_tokens - 1
    return Sample(
        prompt,
        text,
        statistics.completion_tokens,
        statistics.decode_tokens_per_second or 0.0,
        (model.table.statistics.bytes_read - before) / max(1, decoded),
    )


def _figures(model: Model, samples: list[Sample]) -> dict[str, Any]:
    stored, read = model.manifest.table, model.table.statistics
    table_bytes = model.manifest.files[stored.file].bytes
    return {
        "table_bytes": table_bytes,
        "record_bytes": stored.record_bytes,
        "table_bytes_read": read.bytes_read,
        "share_of_table_read": read.bytes_read / table_bytes,
        "bytes_read_per_generated_token": max(each.record_bytes_per_token for each in samples),
        "reader": model.reader,
        "graph_bytes": model.manifest.files[model.manifest.graph.file].bytes,
        "tokens": sum(each.tokens for each in samples),
        "tokens_per_second": min(each.tokens_per_second for each in samples),
    }


def _page(figures: dict[str, Any]) -> str:
    per_token, record = figures["bytes_read_per_generated_token"], figures["record_bytes"]
    verdict = "exactly one record" if per_token == record else f"a record has {number(record)}"
    share = f"{figures['share_of_table_read']:.1%} of the table"
    read = f"{byte_count(figures['table_bytes_read'])}, {share}"
    rows = [
        ("graph in memory", byte_count(figures["graph_bytes"])),
        ("table on storage", byte_count(figures["table_bytes"])),
        ("read per generated token", f"{number(per_token)} bytes: {verdict}"),
        ("read in all", f"{read}, for {figures['tokens']} tokens and their prompts"),
        ("speed", f"at least {figures['tokens_per_second']:.0f} tokens/s on this CPU"),
    ]
    return table([(f"  {name}", value) for name, value in rows])


def _program() -> str:
    """Our name as it was called, with the folder it is in if that is not on the path."""
    called = sys.argv[0]
    return called if Path(called).name == "edge-memllm" else "edge-memllm"


def _say(show: bool, text: str, end: str = "\n") -> None:
    if show:
        print(text, end=end)
        sys.stdout.flush()


DEMO = Command(DemoOptions, execute, _DESCRIPTION, _EXAMPLES)
