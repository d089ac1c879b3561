"""Tables whose records differ by class of tokens: written, read, cached and counted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.benchmark.machine import DeviceProbe
from edge_memllm.cli.inspection import _page
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import EdgeMemLLMError, ExportError, RequestError
from edge_memllm.memory_plan import Choices, footprint, memory_items
from edge_memllm.readers import reader_names
from edge_memllm.statistics import Meter
from edge_memllm.table.table import Table
from edge_memllm.table.writer import TableWriter
from edge_memllm_runtimes.fake import FakeRuntime
from support.ready_codecs import mixed
from support.small_model import SmallArtifact, write_artifact

TOKENS, WIDTH = 40, 256
EVERY = np.arange(TOKENS)


@pytest.fixture
def small(tmp_path: Path) -> SmallArtifact:
    return write_artifact(
        tmp_path / "artifact", mixed=mixed(TOKENS, width=WIDTH), vocab_size=TOKENS, width=WIDTH
    )


def open_table(small: SmallArtifact, reader: str = "pread", **options: Any) -> Table:
    with Artifact.open(small.path) as artifact:
        try:
            return Table.open(artifact, reader, **options)
        except RequestError as error:
            if "cache" in str(error):
                raise
            pytest.skip(str(error))


def expected_rows(small: SmallArtifact, table: Table) -> np.ndarray:
    """What each token's class makes of its row, [V, L, D]."""
    rows = np.empty_like(small.rows)
    for token, number in enumerate(table.layout.class_of.tolist()):
        codec = table.layout.kinds[number].codec
        rows[token] = codec.decode(*codec.encode(small.rows[token : token + 1]), 2, WIDTH)[0]
    return rows


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", reader_names())
@pytest.mark.parametrize("cached", [False, True])
def test_what_was_written_is_read(small: SmallArtifact, reader: str, cached: bool) -> None:
    room = 7 * small.manifest.table.record_bytes if cached else 0
    table = open_table(small, reader, record_cache_bytes=room, hot_tokens=[3, 9, 30])
    expected = expected_rows(small, table)
    random = np.random.default_rng(1)
    for _ in range(12):
        wanted = random.permutation(TOKENS)[: random.integers(1, TOKENS)]
        table.announce(wanted.tolist())
        np.testing.assert_array_equal(table.rows(wanted), expected[wanted])
        np.testing.assert_array_equal(
            table.embeddings(wanted), small.embedding[wanted].astype(np.float16)
        )
    assert (table.statistics.cache_hits > 0) == cached
    table.close()


def test_the_bytes_counted_are_those_of_each_class(small: SmallArtifact) -> None:
    table = open_table(small, record_cache_bytes=100_000)
    sizes = [table.locate(token)[1] for token in range(TOKENS)]
    layouts = table.layout.kinds
    assert sizes == [layouts[number].record_bytes for number in table.layout.class_of]
    assert len(set(sizes)) > 3
    buffer = RecordBuffer(table.layout, TOKENS)
    fetched = table.fetch(np.array([5, 1, 7]), buffer)
    assert fetched[:2] == (3, sizes[5] + sizes[1] + sizes[7])
    assert table.fetch(np.array([7, 8]), buffer)[:2] == (1, sizes[8])
    assert table.statistics.bytes_read == sum(sizes[token] for token in (5, 1, 7, 8))
    assert (table.statistics.records_read, table.statistics.cache_hits) == (4, 1)
    table.close()


def test_a_generation_counts_them_too(small: SmallArtifact) -> None:
    table = open_table(small)
    meter = Meter(FakeRuntime(TOKENS), table, 0)
    with Feeder(FakeRuntime(TOKENS), table, 1, 4, meter.costs) as feeder:
        feeder.prefill(0, [1, 2, 3, 1, 2, 9])
        feeder.decode([5])
    size = [table.locate(token)[1] for token in range(TOKENS)]
    # Two chunks, each distinct token of each once.
    assert meter.statistics(1).table_bytes_read == sum(size[t] for t in (1, 2, 3, 2, 9, 5))
    table.close()


def test_records_are_read_in_the_order_of_the_file(small: SmallArtifact) -> None:
    table = open_table(small)
    asked: list[list[int]] = []
    announced: list[tuple[list[int], int]] = []
    reader = table._reader
    table._reader = type(
        "Spy",
        (),
        {
            "read": lambda _, offsets, targets: (
                asked.append(offsets) or reader.read(offsets, targets)
            ),
            "announce": lambda _, offsets, size: announced.append((offsets, size)),
            "close": lambda _: reader.close(),
        },
    )()
    table.rows(EVERY)
    assert asked == [sorted(table.locate(token)[0] for token in range(TOKENS))]
    assert all(offset % 512 == 0 for offset in asked[0])
    table.announce([*range(TOKENS), TOKENS, -1])
    found = sorted((offset, size) for offsets, size in announced for offset in offsets)
    assert found == sorted(table.locate(token) for token in range(TOKENS))
    table.close()


def test_the_device_probe_reads_what_lies_there(small: SmallArtifact) -> None:
    with Artifact.open(small.path) as artifact:
        try:
            probe = DeviceProbe(artifact)
        except EdgeMemLLMError as error:
            pytest.skip(str(error))
        with probe:
            assert len(probe.single_seconds(list(range(TOKENS)))) == TOKENS - 1
            assert all(probe.batch_rate(way, range(TOKENS)) > 0 for way in probe.ways)


def test_a_cache_must_hold_the_largest_record(small: SmallArtifact) -> None:
    largest = small.manifest.table.record_bytes
    with pytest.raises(RequestError, match=rf"cache of {largest - 1} bytes .* takes {largest}"):
        open_table(small, record_cache_bytes=largest - 1)


def test_inspect_shows_who_gets_how_many_bits(
    small: SmallArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, layout = small.manifest, small.manifest.layout
    print(_page(manifest, footprint(manifest, 16)))
    page = capsys.readouterr().out
    assert f"40 records of up to {max(v.record_bytes for v in layout.kinds)} B" in page
    lines = {line.split()[0]: line.split(maxsplit=5) for line in page.splitlines() if line}
    first, third = manifest.table.classes[0], manifest.table.classes[2]
    # int8-g64 and codebook4-g32: (8.25 + 4.5) / 2 bits per value
    assert lines["0"][1] == str(first.tokens)
    assert lines["0"][4:] == ["6.38", "0 int8-g64, 1 codebook4-g32"]
    assert (lines["2"][1], lines["2"][4:]) == (str(third.tokens), ["5.25", "0-1 int5-g64"])
    places = [item for item in memory_items(manifest, Choices()) if "places" in item.what]
    assert [item.bytes for item in places] == [TOKENS * 9]
    ram = memory_items(manifest, Choices(reader="ram"))
    (table,) = [item for item in ram if item.what == "table in memory"]
    assert table.bytes == layout.records_bytes(TOKENS)


# --- writing ---------------------------------------------------------------------------------


def test_layout_of_the_file(small: SmallArtifact) -> None:
    spec, layout = small.manifest.table, small.manifest.layout
    with safe_open(small.table, framework="numpy") as file:
        assert json.loads(file.metadata()["classes"]) == [
            {"tokens": each.tokens, "layers": list(each.layers)} for each in spec.classes
        ]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts = zip(layout.kinds, spec.classes, strict=True)
    for number, (variant, each) in enumerate(parts):
        records = tensors.pop(f"records.{number}")
        assert records.shape == (each.tokens, variant.stride)
        assert not records[:, variant.record_bytes :].any()
    assert sorted(tensors) == ["checksums", "parameters"]
    assert tensors["checksums"].shape == (TOKENS,)
    parameters = tensors["parameters"].tobytes()
    assert hashlib.sha256(parameters).hexdigest() == spec.parameters_sha256
    assert parameters[:TOKENS] == mixed(TOKENS, width=WIDTH).class_of.tobytes()
    assert spec.record_bytes == max(each.record_bytes for each in layout.kinds)
    assert spec.stride == max(each.stride for each in layout.kinds)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
def test_bytes_are_the_same_whatever_the_chunks(
    small: SmallArtifact, tmp_path: Path, chunk: int
) -> None:
    table = open_table(small)
    order = table.layout.stored_order(TOKENS)
    path = tmp_path / "again"
    with TableWriter(path, table.layout, TOKENS, small.manifest.model.identity) as writer:
        for start in range(0, TOKENS, chunk):
            part = order[start : start + chunk]
            writer.append(small.embedding[part], small.rows[part])
        spec, file = writer.finish()
    assert path.read_bytes() == small.table.read_bytes()
    assert file == small.manifest.files[small.manifest.table.file]
    assert dataclasses.replace(spec, file=small.manifest.table.file) == small.manifest.table
    table.close()


def test_a_value_that_cannot_be_stored_is_named_by_its_token(
    small: SmallArtifact, tmp_path: Path
) -> None:
    table = open_table(small)
    order = table.layout.stored_order(TOKENS)
    rows = small.rows[order]
    rows[25, 1, 3] = np.nan
    identity = small.manifest.model.identity
    match = f"token {order[25]}, memory row of layer 1: nan cannot be stored"
    with (
        pytest.raises(ExportError, match=match),
        TableWriter(tmp_path / "new", table.layout, TOKENS, identity) as writer,
    ):
        writer.append(small.embedding[order], rows)
    table.close()


def test_a_search_is_for_the_classes_that_have_one(small: SmallArtifact, tmp_path: Path) -> None:
    classes = (("int8-g64", "int8-g64"), ("int4-g64", "int4-g64"))
    layout = mixed(TOKENS, classes, WIDTH)
    order, identity = layout.stored_order(TOKENS), small.manifest.model.identity
    with TableWriter(tmp_path / "new", layout, TOKENS, identity, search=True) as writer:
        writer.append(small.embedding[order], small.rows[order])
        writer.finish()
    only8 = mixed(TOKENS, classes[:1], WIDTH)
    with pytest.raises(ExportError, match="codec mixed-g64 has no scales to search for"):
        TableWriter(tmp_path / "other", only8, TOKENS, identity, search=True)
