"""What an overlay costs when the record of one token after the other is fetched.

    python benchmarks/overlay_fetch.py ARTIFACT [--tokens N] [--rounds N] [--json]

The records come from memory, so what is seen is the work: the table alone, the table under an
overlay that leaves the token alone, one that changes all its layers and has done so before, and one
that composes the rows anew each time, by kind of operation. Medians over all fetches, in
microseconds; the kinds take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from edge_memllm.artifact import Artifact
from edge_memllm.overlays import Edit, Operation, OverlaySpec, overlay_of
from edge_memllm.overlays.composing import plain_codec
from edge_memllm.overlays.overlaid_table import OverlaidTable
from edge_memllm.record_source import RecordSource
from edge_memllm.records import RecordBuffer
from edge_memllm.table import Table


def sources(
    artifact: Artifact, table: Table, tokens: list[int]
) -> Iterator[tuple[str, RecordSource]]:
    vocabulary, layers = artifact.manifest.model.vocab_size, range(table.layout.layers)
    row = table.rows(np.array([0]))[0, 0]

    def over(operation: Operation, codec: str, changed: list[int], **options: int) -> OverlaidTable:
        spec = OverlaySpec.for_model(artifact.manifest, operation, codec=codec)
        value = row if operation in ("replace", "add") else None
        factor = 0.5 if operation == "scale" else 1.0
        places = [(token, layer) for token in changed for layer in layers]
        edits = [Edit(*place, operation, value, factor) for place in places]
        return OverlaidTable(table, [overlay_of(spec, edits)], vocabulary, **options)

    same = plain_codec(table.layout.codec).id
    others = [token for token in range(len(tokens) + 1) if token not in tokens][:1]
    yield "the table alone", table
    yield "another token is changed", over("replace", same, others)
    yield "all layers changed, as before", over("replace", same, tokens)
    yield "all layers replaced, same form", over("replace", same, tokens, cache_bytes=0)
    yield "all layers replaced, from f16", over("replace", "f16", tokens, cache_bytes=0)
    yield "all layers added to", over("add", same, tokens, cache_bytes=0)
    yield "all layers scaled", over("scale", same, tokens, cache_bytes=0)
    yield "all layers blank", over("blank", same, tokens, cache_bytes=0)


def timed(source: RecordSource, buffer: RecordBuffer, ids: np.ndarray) -> float:
    start = perf_counter()
    source.fetch(ids, buffer)
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    tokens = list(range(1, given.tokens + 1))
    with Artifact.open(given.artifact) as artifact, closing(Table.open(artifact, "ram")) as table:
        kinds = list(sources(artifact, table, tokens))
        buffer = RecordBuffer(table.layout, 1)
        seconds: dict[str, list[float]] = {name: [] for name, _ in kinds}
        for number in range(given.rounds):
            for name, source in kinds:
                for token in tokens:
                    spent = timed(source, buffer, np.array([token]))
                    if number:  # the first round fills the caches
                        seconds[name].append(spent)
        shape = {"layers": table.layout.layers, "width": table.layout.width}
    found = {name: median(each) * 1e6 for name, each in seconds.items()}
    if given.json:
        print(json.dumps({**shape, "median_us": found}, indent=2))
        return
    print(f"{shape['layers']} layers of {shape['width']}, median us for a token")
    for name, value in found.items():
        print(f"{name:<32}{value:8.1f}")


if __name__ == "__main__":
    main()
