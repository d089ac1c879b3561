"""How exports store embeddings: by default, as asked for, and on the grid of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ExportError
from edge_memllm.table.table import Table
from edge_memllm_export import export_model, requantize
from edge_memllm_export.embedding import choose_embedding, default_form
from edge_memllm_export.sources.gguf_file import GGUFFile
from edge_memllm_export.sources.gguf_grids import Grid, read_grid
from support.checkpoints import MakeArtifact, write_dense
from support.gguf_files import metadata_of, random_model, stored_tensors, write_gguf

Type = gguf.GGMLQuantizationType
WIDTH, TOKENS = 256, 40
KEPT = {"Q4_0": "int4-g32", "Q4_1": "int4a-g32", "Q5_0": "int5-g32", "Q8_0": "int8-g32"}
HALVES = {"Q4_0": 1, "Q4_1": 2, "Q5_0": 1, "Q8_0": 1}  # at the start of a block


class Embeddings:
    """The part of `Rows` that is asked."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def embeddings(self, ids: np.ndarray) -> np.ndarray:
        return self.values[ids]


def random_blocks(kind: str, seed: int) -> np.ndarray:
    """Rows of blocks with any codes; their scales and minima are numbers of either sign."""
    block, size = GGML_QUANT_SIZES[Type[kind]]
    random = np.random.default_rng(seed)
    stored = random.integers(0, 256, (TOKENS * WIDTH // block, size), dtype=np.uint8)
    if kind in HALVES:
        numbers = random.standard_normal((len(stored), HALVES[kind])) * 0.1
        stored[:, : 2 * HALVES[kind]] = numbers.astype("<f2").view(np.uint8)
    else:  # Q6_K, whose scale is at the end
        stored[:, -2:] = np.full((len(stored), 1), 0.01, "<f2").view(np.uint8)
    return stored.reshape(TOKENS, -1)


def grid_of(stored: np.ndarray, kind: str) -> Callable[[int, int], Grid]:
    return lambda start, stop: read_grid(stored[start:stop], Type[kind])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@given(kind=st.sampled_from(list(KEPT)), seed=st.integers(0, 1 << 32), data=st.data())
def test_blocks_of_a_codec_are_kept_bit_for_bit(
    dtype: str, kind: str, seed: int, data: st.DataObject
) -> None:
    stored = random_blocks(kind, seed)
    values = dequantize(stored, Type[kind])
    default = default_form(WIDTH, dtype, few_bits=True)
    found = choose_embedding(None, default, grid_of(stored, kind), Embeddings(values), TOKENS)
    if (kind, dtype) == ("Q4_1", "float32"):  # the codec gives halves
        assert (found.form, found.stored) == (default, None)
        return
    assert found.form.codec.id == KEPT[kind]
    assert found.notes == (f"embeddings: {kind} is kept as {KEPT[kind]}, bit for bit.",)
    assert found.stored is not None
    ids = np.array(data.draw(st.lists(st.integers(0, TOKENS - 1), min_size=1, unique=True)))
    fed = found.form.decode(found.stored(ids))
    np.testing.assert_array_equal(fed, values[ids].astype(dtype))


@pytest.mark.parametrize("kind", KEPT)
def test_codes_are_kept_where_the_network_scales(kind: str) -> None:
    stored = random_blocks(kind, 1)
    values = dequantize(stored, Type[kind]) * np.float32(WIDTH**0.5 * 1.37)
    default = default_form(WIDTH, "float16", few_bits=True)
    found = choose_embedding(None, default, grid_of(stored, kind), Embeddings(values), TOKENS)
    assert "its scales times 21.92" in found.notes[0]
    assert found.stored is not None
    ids = np.arange(TOKENS)
    fed = found.form.decode(found.stored(ids)).astype(np.float64)
    largest = np.abs(values).reshape(TOKENS, -1, 32).max(axis=2)
    error = np.abs(fed - values).reshape(TOKENS, -1, 32).max(axis=2)
    assert (error <= largest * 2.0**-9).all()


def test_other_blocks_are_rounded_and_the_report_says_so() -> None:
    stored = random_blocks("Q6_K", 1)
    rows = Embeddings(dequantize(stored, Type.Q6_K))
    default = default_form(WIDTH, "float16", few_bits=True)
    found = choose_embedding(None, default, grid_of(stored, "Q6_K"), rows, TOKENS)
    assert (found.form, found.stored) == (default, None)
    assert found.notes == (
        "embeddings: Q6_K is rounded to int8-g32, which does not hold it exactly.",
    )


def test_embeddings_that_are_not_the_grids_are_not_kept() -> None:
    stored = random_blocks("Q8_0", 1)
    values = dequantize(stored, Type.Q8_0)
    values[-1, 3] += 1
    default = default_form(WIDTH, "float16", few_bits=False)
    found = choose_embedding(None, default, grid_of(stored, "Q8_0"), Embeddings(values), TOKENS)
    assert (found.form.codec.id, found.stored) == ("f16", None)


@pytest.mark.parametrize("asked", ["int8-g32", "int8-g64", "f16"])
def test_what_is_asked_for_is_kept_where_it_is_the_grid(asked: str) -> None:
    stored = random_blocks("Q8_0", 1)
    rows = Embeddings(dequantize(stored, Type.Q8_0))
    default = default_form(WIDTH, "float16", few_bits=True)
    found = choose_embedding(asked, default, grid_of(stored, "Q8_0"), rows, TOKENS)
    assert found.form.codec.id == asked
    assert (found.stored is not None) == (asked == "int8-g32")


@pytest.mark.parametrize(("kind", "weights"), [("Q8_0", "int4"), ("Q4_1", "fp16")])
def test_an_export_keeps_the_grid_of_a_file(kind: str, weights: str, tmp_path: Path) -> None:
    network = random_model("llama", max_position_embeddings=64)
    metadata = metadata_of("llama", **{"llama.context_length": 64})
    tensors = stored_tensors("llama", network)
    file = write_gguf(tmp_path / "model.gguf", "llama", metadata, tensors, Type[kind])
    report = export_model(file, tmp_path / "out", graph_weights=weights, accept_quality_loss=True)
    assert f"embeddings: {kind} is kept as {KEPT[kind]}, bit for bit." in report.notes
    assert report.manifest.table.embedding_codec == KEPT[kind]
    assert [rung.name for rung in report.rungs if not rung.ok] == []
    truth = GGUFFile.open(file).read("model.embed_tokens.weight")
    with Artifact.open(tmp_path / "out") as artifact, closing(Table.open(artifact)) as table:
        ids = np.arange(len(truth))
        np.testing.assert_array_equal(table.embeddings(ids), truth.astype(np.float16))


@pytest.mark.parametrize(
    ("weights", "width", "codec"),
    [
        ("int4", 64, "int8-g32"),
        ("int8", 64, "int8-g32"),
        ("int8", 48, "f16"),  # no multiple of 32
        ("fp16", 64, "f16"),
        ("fp32", 64, "f32"),
    ],
)
def test_a_dense_models_embeddings_are_as_exact_as_its_matrices(
    weights: str, width: int, codec: str, tmp_path: Path
) -> None:
    checkpoint = write_dense(tmp_path / "dense", "llama", hidden_size=width)
    report = export_model(
        checkpoint, tmp_path / "out", graph_weights=weights, accept_quality_loss=True
    )
    assert report.manifest.table.embedding_codec == codec
    assert [rung.name for rung in report.rungs if not rung.ok] == []


@pytest.mark.parametrize("table", ["int4", "f16", "int4a-g32"])
def test_a_codec_that_is_asked_for(table: str, checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(
        checkpoint,
        tmp_path / "out",
        table_codec=table,
        embedding_codec="int6",
        accept_quality_loss=True,
    )
    assert report.manifest.table.embedding_codec == "int6-g64"
    assert [rung.name for rung in report.rungs if not rung.ok] == []


def test_memory_keeps_embeddings_as_they_are_fed(make_artifact: MakeArtifact) -> None:
    with Artifact.open(make_artifact(graph_weights="int4")) as artifact:
        assert artifact.manifest.table.embedding_codec == "f16"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("int7", "embedding codec int7: table codec 'int7', expected one of f32, f16"),
        ("codebook4", "embedding codec codebook4: embedding codec codebook4-g64: expected one"),
        ("int8-g128", "embedding codec int8-g128: codec int8-g128: width 64 is not a multiple"),
    ],
)
def test_codecs_that_cannot_store_embeddings(
    word: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", embedding_codec=word)


def test_a_requantised_table_has_the_same_embeddings(checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export_model(
        checkpoint, first, table_codec="f16", embedding_codec="int5", accept_quality_loss=True
    )
    report = requantize(first, second, table_codec="int8")
    assert report.manifest.table.embedding_codec == "int5-g64"
    found = []
    for path in (first, second):
        with Artifact.open(path) as artifact, closing(Table.open(artifact)) as table:
            found.append(table.stored_embeddings(np.arange(300)))
    np.testing.assert_array_equal(*found)
