"""Memory rows of GGUF files: kept in the codec that holds their blocks, and never held whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.codecs import get_codec
from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision import Target
from edge_memllm.options.export import ExportOptions
from edge_memllm.table.table import Table
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.exporter import graph_form
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from edge_memllm_export.kept_rows import RowsChoice, choose_rows
from edge_memllm_export.sources.gguf_file import GGUFFile
from edge_memllm_export.sources.gguf_grids import Grid, read_grid
from support.gguf_files import rounded, write_gguf
from support.gguf_gemma import ROW, VOCABULARY, gemma4, gemma4_metadata, gemma4_tensors

Type = GGMLQuantizationType
TOKENS, LAYERS, WIDTH = 40, 4, 64
TABLE = "model.embed_tokens_per_layer.weight"
KEPT = {"Q4_0": "int4-g32", "Q4_1": "int4a-g32", "Q5_0": "int5-g32", "Q8_0": "int8-g32"}
INT8 = get_codec("int8-g64")


class MemoryRows:
    """The part of `Rows` that is asked: what is stored times a factor."""

    def __init__(self, stored: np.ndarray, factor: float) -> None:
        self.values = (stored * np.float32(factor)).reshape(TOKENS, LAYERS, -1)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self.values[ids]


def random_blocks(kind: str, seed: int) -> np.ndarray:
    """Rows of blocks with any codes; scales and minima are small numbers of either sign."""
    block, size = GGML_QUANT_SIZES[Type[kind]]
    random = np.random.default_rng(seed)
    stored = random.integers(0, 256, (TOKENS * LAYERS * WIDTH // block, size), dtype=np.uint8)
    numbers = random.standard_normal((len(stored), 2 if kind == "Q4_1" else 1)) * 0.1
    halves = numbers.astype("<f2").view(np.uint8)
    if kind == "Q6_K":  # whose scale is at the end
        stored[:, -2:] = halves
    else:
        stored[:, : halves.shape[1]] = halves
    return stored.reshape(TOKENS, -1)


def grid_of(stored: np.ndarray, kind: str) -> Callable[[int, int], Grid]:
    return lambda start, stop: read_grid(stored[start:stop], Type[kind])


def chosen(kind: str, factor: float = 16.0, seed: int = 1, **options: Any) -> RowsChoice:
    stored = random_blocks(kind, seed)
    rows = MemoryRows(dequantize(stored, Type[kind]), factor)
    options = {"codec": INT8, "asked": False, "dtype": "float16", **options}
    return choose_rows(grid=grid_of(stored, kind), rows=rows, vocab_size=TOKENS, **options)


@given(kind=st.sampled_from(list(KEPT)), seed=st.integers(0, 1 << 32), data=st.data())
def test_blocks_of_a_codec_are_kept_times_the_networks_factor(
    kind: str, seed: int, data: st.DataObject
) -> None:
    found = chosen(kind, seed=seed)
    assert found.codec.id == KEPT[kind] and found.stored is not None
    expected = f"memory rows: {kind} is kept as {KEPT[kind]}, its scales times 16, exactly."
    assert found.notes == (expected,)
    ids = np.array(data.draw(st.lists(st.integers(0, TOKENS - 1), min_size=1, unique=True)))
    values = dequantize(random_blocks(kind, seed), Type[kind])[ids] * np.float32(16)
    values = values.astype(np.float16) if kind == "Q4_1" else values  # which gives halves
    decoded = found.codec.decode(*found.stored(ids), LAYERS, WIDTH)
    np.testing.assert_array_equal(decoded.reshape(len(ids), -1), values)


def test_a_factor_that_is_no_power_of_two_is_told() -> None:
    assert chosen("Q8_0", 5.7).notes == (
        "memory rows: Q8_0 is kept as int8-g32, its scales times 5.7.",
    )


def test_other_blocks_are_rounded_and_the_report_says_so() -> None:
    found = chosen("Q6_K")
    note = "memory rows: Q6_K is rounded to int8-g64, which does not hold it exactly."
    assert found == RowsChoice(INT8, notes=(note,))
    # Of Q4_1 the codec gives halves, which is less than a float32 graph is fed.
    assert chosen("Q4_1", dtype="float32").codec is INT8


def test_a_codec_that_is_asked_for_wins() -> None:
    int3 = get_codec("int3-g64")
    assert chosen("Q8_0", codec=int3, asked=True) == RowsChoice(int3)
    assert chosen("Q6_K", codec=int3, asked=True) == RowsChoice(int3)
    same = chosen("Q8_0", codec=get_codec("int8-g32"), asked=True)
    assert same.codec.id == "int8-g32" and same.stored is not None


def written(path: Path, form: str, kind: str) -> Any:
    """Write a network to `path` and return transformers' own, its matrices as `kind` has them."""
    network, stored = gemma4(form), Type[kind]
    write_gguf(path, "gemma4", gemma4_metadata(network.config), gemma4_tensors(network), stored)
    return rounded(network, stored)


@pytest.mark.parametrize(
    ("form", "kind", "codec", "kept"),
    [
        ("E2B", "F32", "f32", "f32"),
        ("E2B", "Q4_0", None, "int4-g32"),
        ("E4B", "F16", "f16", "f16"),
        ("E4B", "Q8_0", None, "int8-g32"),
        ("31B", "Q4_0", None, "none"),
    ],
)
def test_an_artifact_of_a_file_computes_what_its_weights_say(
    form: str, kind: str, codec: str | None, kept: str, tmp_path: Path
) -> None:
    network = written(tmp_path / "m.gguf", form, kind)
    report = export_model(
        tmp_path / "m.gguf",
        tmp_path / "out",
        graph_weights="fp32",
        table_codec=codec,
        accept_quality_loss=True,
    )
    assert [rung for rung in report.rungs if not rung.ok] == []
    assert report.manifest.table.codec == kept
    ids = [(37 * place + 11) % VOCABULARY for place in range(40)]
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0].numpy()
    reference = Checkpoint.open(tmp_path / "m.gguf").architecture.reference()
    with JudgedArtifact(tmp_path / "out", reference) as judged:
        found = np.concatenate(list(judged.graph_logits(ids, 7)))
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_the_table_holds_the_codes_of_the_file(kind: str, tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", "E2B", kind)
    export_model(
        tmp_path / "m.gguf", tmp_path / "out", graph_weights="fp16", accept_quality_loss=True
    )
    file = GGUFFile.open(tmp_path / "m.gguf")
    grid, values = file.grid(TABLE), file.read(TABLE)
    assert grid is not None
    zero = {"Q4_0": 8, "Q8_0": 128}[kind]
    ids = np.arange(VOCABULARY)
    with Artifact.open(tmp_path / "out") as artifact, closing(Table.open(artifact)) as table:
        layout, rows = artifact.manifest.layout, table.rows(ids)
        content = np.fromfile(tmp_path / "out" / "table.safetensors", np.uint8)
    start = artifact.manifest.table.records_offset
    records = content[start : start + VOCABULARY * layout.stride].reshape(VOCABULARY, -1)
    begin = layout.embedding.stored_bytes
    scales, codes = np.split(
        records[:, begin : layout.record_bytes], [2 * grid.scales.shape[1]], axis=1
    )
    np.testing.assert_array_equal(scales.copy().view("<f2"), grid.scales * 8)  # the root of ROW
    if kind == "Q4_0":
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(VOCABULARY, -1)
    np.testing.assert_array_equal(codes.astype(np.int16) - zero, grid.codes)
    np.testing.assert_array_equal(rows.reshape(VOCABULARY, -1), values * 8)


def test_the_table_is_read_in_parts_and_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "m.gguf", "E2B", "Q4_0")
    most, longest = 16, 0
    monkeypatch.setattr("edge_memllm_export.checkpoint._PART_VALUES", most * 6 * ROW)
    read = GGUFFile.read

    def noting(self: GGUFFile, name: str, *rows: Any) -> np.ndarray:
        nonlocal longest
        found = read(self, name, *rows)
        longest = max(longest, len(found)) if name == TABLE else longest
        return found

    monkeypatch.setattr(GGUFFile, "read", noting)
    checkpoint = Checkpoint.open(tmp_path / "m.gguf")
    assert longest == 0
    assert checkpoint.architecture.weights[TABLE].is_meta
    assert checkpoint.parameters > VOCABULARY * 6 * ROW
    checkpoint.identity()
    rows = checkpoint.architecture.reference().rows(most)
    whole = [part for _, part in rows.chunks(np.arange(VOCABULARY))]
    assert 0 < longest <= most
    expected = read(GGUFFile.open(tmp_path / "m.gguf"), TABLE) * np.float32(8)
    np.testing.assert_array_equal(np.concatenate(whole).reshape(VOCABULARY, -1), expected)
    some = np.array([7, 8, 250, 3])
    np.testing.assert_array_equal(rows.rows(some).reshape(4, -1), expected[some])


def test_a_file_and_a_folder_of_one_network_have_one_identity(tmp_path: Path) -> None:
    network = written(tmp_path / "m.gguf", "E2B", "F32")
    network.save_pretrained(tmp_path / "folder")
    found = [Checkpoint.open(tmp_path / name).identity() for name in ("m.gguf", "folder")]
    assert found[0] == found[1]


def test_scales_are_not_searched_for_where_rows_are_kept(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", "E2B", "Q4_0")
    with pytest.raises(ExportError, match=r"table search: the memory rows of .* kept as int4-g32"):
        export_model(tmp_path / "m.gguf", tmp_path / "out", table_search=True)


def test_a_size_of_the_table_leaves_matrices_as_the_file_has_them(tmp_path: Path) -> None:
    def method(form: str) -> str | None:
        written(tmp_path / "m.gguf", form, "Q8_0")
        source = Checkpoint.open(tmp_path / "m.gguf")
        target = Target(bits=4.5, file_bytes=None)
        options = ExportOptions(source.path, tmp_path / "out", table_target=target)
        return graph_form(source, options).method

    assert method("E2B") is None
    assert method("31B") == "gptq"  # without rows the target is for the matrices
