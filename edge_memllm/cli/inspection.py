"""``edge-memllm inspect`` and ``verify``: what an artifact is and will need, and if it is whole.

The first reads the manifest alone, the second every byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from edge_memllm.artifact.folder import Artifact, Directory, read_manifest
from edge_memllm.artifact.layout import TableLayout
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.artifact.verification import verify_artifact
from edge_memllm.cli.export import rung_table
from edge_memllm.cli.models import known_artifact
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import (
    StageBars,
    byte_count,
    number,
    table,
    table_codecs,
    write_json,
)
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.memory_plan import (
    Choices,
    Footprint,
    footprint,
    packed_disk_bytes,
    packs_by_itself,
    tokenizer_bytes,
)
from edge_memllm.options import Option, positive_int
from edge_memllm.text import TOKENIZER_FILE, VOCABULARY_FILE

if TYPE_CHECKING:
    from edge_memllm_export import ParityCheck

_INSPECT = """\
Show what is in an artifact and what it will need: memory while running, disk, and bytes read
from the table per token. Reads the manifest alone, so it answers at once however large the
artifact is; 'edge-memllm verify' is what checks the files."""

_INSPECT_EXAMPLES = """\
  edge-memllm inspect artifact
  edge-memllm inspect artifact --tokens 2048
  edge-memllm inspect artifact --json"""

_VERIFY = """\
Check a whole artifact: the digest of every file, the checksum of every record of the table, that
padding is zero, and that graph, table and manifest belong to the same model. The graph is loaded
for that.

With --against the artifact is also compared with the checkpoint it was exported from: the parity
ladder, six rungs from codec to chunked prefill. That needs the export extra."""

_VERIFY_EXAMPLES = """\
  edge-memllm verify artifact
  edge-memllm verify artifact --against checkpoint"""

_COUNTED = "feed_forward_parameters"


@dataclass(frozen=True)
class InspectOptions:
    """What may be asked of ``edge-memllm inspect``."""

    artifact: Annotated[Path, Option("an exported model, or a name that 'list' shows")]
    _: KW_ONLY
    tokens: Annotated[
        int | None,
        Option(
            "estimate memory for a text of N tokens", parse=positive_int, unset="the whole context"
        ),
    ] = None
    json: Json = False


@dataclass(frozen=True)
class VerifyOptions:
    """What may be asked of ``edge-memllm verify``."""

    artifact: Annotated[Path, Option("an exported model, or a name that 'list' shows")]
    _: KW_ONLY
    against: Annotated[
        Path | None, Option("compare it with its checkpoint", metavar="CHECKPOINT")
    ] = None
    json: Json = False


def inspect(options: InspectOptions) -> int:
    """Run ``edge-memllm inspect``."""
    manifest = _read_manifest(known_artifact(options.artifact))
    context = manifest.model.max_position_embeddings
    tokens = context if options.tokens is None else options.tokens
    if tokens > context:
        raise RequestError(f"--tokens is {tokens}, the model's context holds {context}.")
    needs = footprint(manifest, tokens)
    if options.json:
        facts = manifest.as_dict() | {"parameters": parameters(manifest.model)}
        write_json({**facts, "needs": asdict(needs)})
    else:
        print(_page(manifest, needs))
    return 0


def _read_manifest(path: Path) -> Manifest:
    """The manifest alone: opening the artifact would read the whole graph for its digest."""
    directory = Directory(path)
    try:
        return read_manifest(directory)
    finally:
        directory.close()


def parameters(model: ModelSpec) -> dict[str, int]:
    """Parameters left to compute, by part, and the values that the table holds instead.

    Norms are left out; feed-forward parts are counted as the model's details say.
    """
    width, memory, heads = model.hidden_size, model.memory, model.num_attention_heads
    columns = sum(2 * (heads + cache.kv_heads) * cache.head_dim for cache in model.caches)
    computed = model.details.get(_COUNTED)
    return {
        "attention": width * columns,
        "compute_ffn": computed if isinstance(computed, int) else 0,
        "head": model.vocab_size * width,
        "table_values": model.vocab_size * memory.layers * memory.width,
    }


def _page(manifest: Manifest, needs: Footprint) -> str:
    model, stored = manifest.model, manifest.table
    weights = f"{manifest.graph.weights} weights, {manifest.graph.compute_dtype}"
    most = "" if stored.classes is None else "up to "
    records = f"{number(model.vocab_size)} records of {most}{byte_count(stored.record_bytes)}"
    kv_part = f"of which keys and values {byte_count(needs.kv_bytes)}"
    whole = f"about {byte_count(needs.resident_bytes_with_table)} with the table in it"
    rows = [
        ("model", _kind(model)),
        ("", f"{model.num_hidden_layers} layers of width {model.hidden_size}, {_heads(model)}"),
        ("", f"vocabulary {number(model.vocab_size)}, context {model.max_position_embeddings}"),
        ("identity", model.identity),
        ("graph", f"{weights}: {byte_count(needs.graph_bytes)}"),
        ("", _computed(parameters(model))),
        ("table", f"{table_codecs(stored)}: {byte_count(needs.table_bytes)}"),
        ("", f"{records}, one every {most}{byte_count(stored.stride)}"),
        ("tokenizer", _tokenizer(manifest)),
        ("made by", manifest.producer),
        ("", ""),
        ("needs", f"for a text of {number(needs.tokens)} tokens"),
        ("disk", byte_count(needs.disk_bytes)),
        ("memory", f"about {byte_count(needs.resident_bytes)}, {kv_part}"),
        ("", f"{whole} (--reader ram)"),
        *_packed(manifest, needs),
        ("reads", f"{most}{byte_count(needs.record_bytes)} from the table per generated token"),
    ]
    files = [(name, byte_count(spec.bytes)) for name, spec in sorted(manifest.files.items())]
    classes = _class_rows(manifest.layout)
    parts: list[list[tuple[str, ...]]] = [[*rows], classes, [("file", "size"), *files]]
    return "\n\n".join(table(part) for part in parts if part)


def _tokenizer(manifest: Manifest) -> str:
    if TOKENIZER_FILE not in manifest.files:
        return "none"
    read = VOCABULARY_FILE in manifest.files
    kind = "its vocabulary file is read" if read else "the library tokenizers reads it"
    return f"{kind}, about {byte_count(tokenizer_bytes(manifest))} of memory"


def _packed(manifest: Manifest, needs: Footprint) -> list[tuple[str, str]]:
    """What loading keeps in the user's cache, where it does."""
    if not packs_by_itself(manifest):
        return []
    without = footprint(manifest, needs.tokens, Choices(packed=False)).resident_bytes
    disk = byte_count(packed_disk_bytes(manifest))
    return [
        ("", f"about {byte_count(without)} without repacked weights in the user's cache, which"),
        ("", f"take {disk} of disk from the first load on (--packed-cache off)"),
    ]


def _class_rows(layout: TableLayout) -> list[tuple[str, ...]]:
    """Who gets how many bits, where classes of tokens differ."""
    if not layout.classes:
        return []
    values = layout.layers * layout.width
    rows: list[tuple[str, ...]] = [("class", "tokens", "record", "bits", "codec of each layer")]
    for place, (each, kind) in enumerate(zip(layout.classes, layout.kinds, strict=True)):
        stored = kind.record_bytes - kind.embedding_bytes
        record, bits = byte_count(kind.record_bytes), f"{8 * stored / values:.2f}"
        rows.append((str(place), number(each.tokens), record, bits, _layer_ranges(each.layers)))
    return rows


def _layer_ranges(layers: Sequence[str]) -> str:
    """Neighbours of one codec together: ``0-3 int8-g64, 4 int5-g64``."""
    found: list[str] = []
    first = 0
    for codec, same in groupby(layers):
        last = first + len(list(same)) - 1
        found.append(f"{first}-{last} {codec}" if last > first else f"{first} {codec}")
        first = last + 1
    return ", ".join(found)


def _kind(model: ModelSpec) -> str:
    details = [f"{name} {value}" for name, value in model.details.items() if name != _COUNTED]
    named = ", ".join([model.architecture, *details])
    one = f"a gate of {model.memory.width} values" if model.memory.kind == "gate" else "a row"
    match model.memory.layers:
        case 0:
            return f"{named}: without token memory (dense), the table holds embeddings only"
        case 1:
            return f"{named}: the table holds {one} that all layers share"
        case _:
            return f"{named}: the table holds {one} for each layer"


def _heads(model: ModelSpec) -> str:
    """Every kind of heads once, in the order of the layers."""
    kinds = dict.fromkeys((cache.kv_heads, cache.head_dim) for cache in model.caches)
    return " or ".join(_kind_of_heads(model.num_attention_heads, *kind) for kind in kinds)


def _kind_of_heads(count: int, shared: int, width: int) -> str:
    heads = f"{count} heads of {width}"
    return heads if shared == count else f"{heads} sharing {shared} key{'' if shared == 1 else 's'}"


def _computed(counts: dict[str, int]) -> str:
    parts = [f"attention {number(counts['attention'])}"]
    if counts["compute_ffn"]:
        parts.append(f"feed-forward about {number(counts['compute_ffn'])}")
    parts.append(f"head {number(counts['head'])}")
    return f"parameters: {', '.join(parts)}"


def verify(options: VerifyOptions) -> int:
    """Run ``edge-memllm verify``; 1 when a rung does not hold."""
    folder = known_artifact(options.artifact)
    with Artifact.open(folder) as artifact:
        _check(artifact)
        facts = _facts(artifact)
    rungs = _ladder(folder, options.against) if options.against else []
    ok = all(rung.ok for rung in rungs)
    if options.json:
        write_json({"ok": ok, **facts, "rungs": [asdict(rung) | {"ok": rung.ok} for rung in rungs]})
    else:
        print(_verdict(facts, rungs))
    return 0 if ok else 1


def _check(artifact: Artifact) -> None:
    """Files and records, then the graph, which refuses a table of another model."""
    from edge_memllm_runtimes import open_runtime

    with StageBars() as bars:
        verify_artifact(artifact, bars)
    open_runtime(artifact, "cpu").close()


def _ladder(artifact: Path, checkpoint: Path) -> list[ParityCheck]:
    try:
        from edge_memllm_export import verify_against
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export") from error
    return verify_against(artifact, checkpoint)


def _facts(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "identity": manifest.model.identity,
        "files": len(manifest.files),
        "bytes": sum(spec.bytes for spec in manifest.files.values()),
        "records": manifest.model.vocab_size,
    }


def _verdict(facts: dict[str, Any], rungs: list[ParityCheck]) -> str:
    whole = (
        f"ok: {facts['files']} files, {number(facts['bytes'])} bytes, {number(facts['records'])} "
        f"records; graph and table belong to {facts['identity']}"
    )
    return f"{whole}\n\n{rung_table(rungs)}" if rungs else whole


INSPECT = Command(InspectOptions, inspect, _INSPECT, _INSPECT_EXAMPLES)
VERIFY = Command(VerifyOptions, verify, _VERIFY, _VERIFY_EXAMPLES)
