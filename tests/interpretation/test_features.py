"""Vectors of tokens, from a checkpoint and from a table: whole, in blocks, and in a sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edge_memllm
from edge_memllm import Model, RequestError
from edge_memllm.interpretation import memory as module
from edge_memllm.interpretation.memory import (
    EMBEDDING,
    Features,
    TableMemory,
    check_layers,
    features_of,
    sample_tokens,
    unit,
)
from support import GOLDEN
from support.checkpoints import VOCABULARY, MakeArtifact, MakeCheckpoint
from support.interpretation import network_memory
from support.small_model import open_small_model, write_small_artifact

EVERY = np.arange(VOCABULARY)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, as a large vocabulary has them."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("edge_memllm.table.source._CHUNK_BYTES", 1 << 14)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    with open_small_model(write_small_artifact(tmp_path / "a").path) as opened:
        yield opened


def gathered(features: Features, layers: list[int]) -> dict[int, np.ndarray]:
    """All blocks in their places; every token comes once in each layer."""
    seen: list[tuple[int, int]] = []
    found: dict[int, np.ndarray] = {}
    for block in features.blocks(layers, lambda done, total: seen.append((done, total))):
        whole = found.setdefault(
            block.layer, np.full((VOCABULARY, block.vectors.shape[1]), np.nan, np.float32)
        )
        assert np.isnan(whole[block.ids]).all()
        whole[block.ids] = block.vectors
    assert seen[-1] == (len(layers) * VOCABULARY, len(layers) * VOCABULARY)
    assert len(seen) > 2
    return found


@pytest.mark.usefixtures("small_chunks")
def test_coefficients_and_rows_of_a_checkpoint(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(beta=1))
    features = features_of(memory)
    assert (features.kind, features.size, features.layers) == ("coefficients", memory.keys, 2)
    found = gathered(features, [1, 0, EMBEDDING])
    for layer in (0, 1):
        np.testing.assert_allclose(found[layer], memory.coefficients(layer, EVERY), atol=1e-5)
    assert np.array_equal(found[EMBEDDING], memory.embeddings(EVERY))
    few = np.array([7, 3, 299])
    assert np.array_equal(features.vectors(EMBEDDING, few), memory.embeddings(few))
    np.testing.assert_allclose(features.vectors(1, few), found[1][few], atol=1e-5)
    rows = features_of(memory, "rows")
    assert (rows.kind, rows.size) == ("rows", memory.width)
    np.testing.assert_allclose(gathered(rows, [1])[1], memory.rows(1, EVERY), atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("codec", ["f32", "int8", "mixed"])
def test_a_table_gives_its_rows(codec: str, make_artifact: MakeArtifact) -> None:
    if codec == "mixed":
        path = GOLDEN / "v2" / "fp32-mixed-g32"
    else:
        path = make_artifact(beta=1, table_codec=codec)
    with edge_memllm.load(path, device="cpu") as model:
        count = model.manifest.model.vocab_size
        every = np.arange(count)
        rows, embeddings = model.table.rows(every), model.table.embeddings(every)
        memory = TableMemory(model)
        assert features_of(memory) is memory
        assert (memory.kind, memory.keys, memory.layers) == ("rows", None, rows.shape[1])
        few = every[[5, 1, count - 1]]
        assert np.array_equal(memory.rows(1, few), rows[few, 1])
        assert np.array_equal(memory.embeddings(few), embeddings[few])
        if codec != "mixed":
            found = gathered(memory, [1, EMBEDDING])
            assert np.array_equal(found[1], rows[:, 1])
            assert np.array_equal(found[EMBEDDING], embeddings)
        else:
            blocks = list(memory.blocks([0], lambda done, total: None))
            ids = np.concatenate([block.ids for block in blocks])
            assert sorted(ids.tolist()) == every.tolist()
            assert np.array_equal(np.concatenate([each.vectors for each in blocks]), rows[ids, 0])


def test_one_pass_reads_a_table_once(model: Model) -> None:
    for _ in TableMemory(model).blocks([0, 1, EMBEDDING], lambda done, total: None):
        pass
    assert model.table.statistics.records_read == VOCABULARY


def test_what_is_not_there_is_refused(make_checkpoint: MakeCheckpoint, model: Model) -> None:
    table = TableMemory(model)
    for ask in (table.coefficients, lambda layer, ids: table.values(layer)):
        with pytest.raises(RequestError, match="An artifact has no keys"):
            ask(0, EVERY)
    with pytest.raises(RequestError, match="no coefficients"):
        features_of(table, "coefficients")
    free = network_memory(make_checkpoint(memory_source="table"))
    assert features_of(free).kind == "rows"
    for layers in ([2], [-1]):
        with pytest.raises(RequestError, match="those that have are 0 to 1"):
            check_layers(layers, 2)
    for layers in ([], [1, 1]):
        with pytest.raises(RequestError, match="at least one, and each once"):
            check_layers(layers, 2)


def test_a_dense_artifact_has_no_memory(make_artifact: MakeArtifact) -> None:
    with (
        edge_memllm.load(make_artifact(beta=8), device="cpu") as model,
        pytest.raises(RequestError, match="dense"),
    ):
        TableMemory(model)


def test_samples_are_bounded_and_repeatable(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = TableMemory(model)
    assert np.array_equal(sample_tokens(memory, 1000, 0), EVERY)
    few = sample_tokens(memory, 50, 0)
    assert len(few) == 50
    assert (np.diff(few) > 0).all()
    assert np.array_equal(few, sample_tokens(memory, 50, 0))
    assert not np.array_equal(few, sample_tokens(memory, 50, 1))
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 10 * 4 * memory.size)
    assert len(sample_tokens(memory, 50, 0)) == 10


def test_unit_vectors(random: np.random.Generator) -> None:
    vectors = random.standard_normal((4, 3)).astype(np.float32)
    vectors[2] = 0
    lengths = np.linalg.norm(unit(vectors), axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 0, 1], rtol=1e-6)
