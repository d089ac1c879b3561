"""``edge-memllm inspect``: what an artifact is and what it will need, without loading it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_memllm.cli.options import add_command, add_json, positive_int
from edge_memllm.cli.output import byte_count, number, table, write_json
from edge_memllm.errors import RequestError

if TYPE_CHECKING:
    from edge_memllm.artifact.layout import RecordLayout
    from edge_memllm.artifact.manifest import Manifest, ModelSpec
    from edge_memllm.cli.options import Commands
    from edge_memllm.memory_plan import Footprint

_DESCRIPTION = """\
Show what is in an artifact and what it will need: memory while running, disk, and bytes read
from the table per token. Reads the manifest alone, so it answers at once however large the
artifact is; 'edge-memllm verify' is what checks the files."""

_EXAMPLES = """\
  edge-memllm inspect artifact
  edge-memllm inspect artifact --tokens 2048
  edge-memllm inspect artifact --json"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "inspect",
        execute,
        summary="show what an artifact holds and needs",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="estimate memory for a text of N tokens (default: the whole context)",
    )
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from edge_memllm.hub import artifact_folder
    from edge_memllm.memory_plan import footprint

    manifest = _read_manifest(artifact_folder(arguments.artifact))
    context = manifest.model.max_position_embeddings
    tokens = context if arguments.tokens is None else arguments.tokens
    if tokens > context:
        raise RequestError(f"--tokens is {tokens}, the model's context holds {context}.")
    needs = footprint(manifest, tokens)
    if arguments.json:
        write_json({**_facts(manifest), "needs": asdict(needs)})
    else:
        print(_page(manifest, needs))
    return 0


def _read_manifest(path: Path) -> Manifest:
    """The manifest alone: opening the artifact would read the whole graph for its digest."""
    from edge_memllm.artifact.folder import Directory
    from edge_memllm.artifact.manifest import MANIFEST_NAME, Manifest
    from edge_memllm.artifact.strict_json import MAX_JSON_BYTES

    directory = Directory(path)
    try:
        with os.fdopen(directory.open_file(MANIFEST_NAME), "rb") as file:
            return Manifest.from_json(file.read(MAX_JSON_BYTES + 1), str(path / MANIFEST_NAME))
    finally:
        directory.close()


def _facts(manifest: Manifest) -> dict[str, Any]:
    return asdict(manifest) | {"parameters": parameters(manifest.model)}


def parameters(model: ModelSpec) -> dict[str, int]:
    """Parameters left to compute, by part, and the values that the table holds instead.

    FFN-C is counted by its budget of ``beta * hidden_size ** 2`` per layer; norms are left out.
    """
    width, layers = model.hidden_size, model.num_hidden_layers
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return {
        "attention": layers * width * heads * model.head_dim,
        "compute_ffn": layers * model.beta * width**2,
        "head": model.vocab_size * width,
        "table_values": model.vocab_size * model.memory_layers * width,
    }


def _page(manifest: Manifest, needs: Footprint) -> str:
    model, stored = manifest.model, manifest.table
    weights = f"{manifest.graph.weights} weights, {manifest.graph.compute_dtype}"
    most = "" if stored.classes is None else "up to "
    records = f"{number(model.vocab_size)} records of {most}{byte_count(stored.record_bytes)}"
    kv_part = f"of which keys and values {byte_count(needs.kv_bytes)}"
    whole = f"about {byte_count(needs.resident_bytes_with_table)} with the table in it"
    rows = [
        ("model", _family(model.beta)),
        ("", f"{model.num_hidden_layers} layers of width {model.hidden_size}, {_heads(model)}"),
        ("", f"vocabulary {number(model.vocab_size)}, context {model.max_position_embeddings}"),
        ("identity", model.identity),
        ("graph", f"{weights}: {byte_count(needs.graph_bytes)}"),
        ("", _computed(parameters(model))),
        ("table", f"{stored.codec}: {byte_count(needs.table_bytes)}"),
        ("", f"{records}, one every {most}{byte_count(stored.stride)}"),
        ("made by", manifest.producer),
        ("", ""),
        ("needs", f"for a text of {number(needs.tokens)} tokens"),
        ("disk", byte_count(needs.disk_bytes)),
        ("memory", f"about {byte_count(needs.resident_bytes)}, {kv_part}"),
        ("", f"{whole} (--reader ram)"),
        ("reads", f"{most}{byte_count(needs.record_bytes)} from the table per generated token"),
    ]
    files = [(name, byte_count(spec.bytes)) for name, spec in sorted(manifest.files.items())]
    classes = _class_rows(manifest.layout)
    parts: list[list[tuple[str, ...]]] = [[*rows], classes, [("file", "size"), *files]]
    return "\n\n".join(table(part) for part in parts if part)


def _class_rows(layout: RecordLayout) -> list[tuple[str, ...]]:
    """Who gets how many bits, where classes of tokens differ."""
    classes = layout.codec.classes
    if classes is None:
        return []
    values = layout.layers * layout.width
    rows: list[tuple[str, ...]] = [("class", "tokens", "record", "bits", "codec of each layer")]
    for place, (each, variant) in enumerate(zip(classes, layout.variants, strict=True)):
        stored = variant.record_bytes - variant.embedding_bytes
        record, bits = byte_count(variant.record_bytes), f"{8 * stored / values:.2f}"
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


def _family(beta: int) -> str:
    match beta:
        case 0:
            return "MemoryLLM: every feed-forward layer is in the table"
        case 8:
            return "dense transformer: the table holds embeddings only"
        case _:
            return f"Flex-MemoryLLM, beta {beta}: {beta}/8 of each feed-forward layer is computed"


def _heads(model: ModelSpec) -> str:
    shared = model.num_key_value_heads
    heads = f"{model.num_attention_heads} heads of {model.head_dim}"
    return heads if shared == model.num_attention_heads else f"{heads} sharing {shared} keys"


def _computed(counts: dict[str, int]) -> str:
    parts = [f"attention {number(counts['attention'])}"]
    if counts["compute_ffn"]:
        parts.append(f"feed-forward about {number(counts['compute_ffn'])}")
    parts.append(f"head {number(counts['head'])}")
    return f"parameters: {', '.join(parts)}"
