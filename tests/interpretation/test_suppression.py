"""Words turned down: what is asked of each row is what the changed row says, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edge_memllm import RequestError
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.interpretation import head as directions_module
from edge_memllm.interpretation import suppression as suppression_module
from edge_memllm.interpretation.head import WordDirections, vocabulary_spread
from edge_memllm.interpretation.memory import NetworkRecords
from edge_memllm.interpretation.network import NetworkMemory
from edge_memllm.interpretation.suppression import (
    Suppression,
    memory_gain,
    other_directions,
    other_rows,
    suppress_words,
)
from edge_memllm.modeling.rows import NetworkRows
from edge_memllm.overlays import OverlaySpec, overlay_of
from edge_memllm.overlays.table import OverlaidTable
from support.checkpoints import VOCABULARY, MakeCheckpoint
from support.interpretation import WITH_KEYS, WITH_MEMORY, network_memory

EVERY = np.arange(VOCABULARY)
WORDS = np.array([65, 97, 120])
MOST = 40
IDENTITY = "sha256:" + "0" * 64


@pytest.fixture(params=WITH_MEMORY.values(), ids=WITH_MEMORY)
def memory(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> NetworkMemory:
    return network_memory(make_checkpoint(**request.param))


@pytest.fixture
def plain_memory(make_checkpoint: MakeCheckpoint) -> NetworkMemory:
    return network_memory(make_checkpoint(beta=1))


def directions_of(memory: NetworkMemory, words: Sequence[int] = tuple(WORDS)) -> WordDirections:
    return WordDirections(memory.head.directions(np.array(words)), vocabulary_spread(memory.head))


def suppressed(memory: NetworkMemory, **options: Any) -> Suppression:
    return suppress_words(memory, directions_of(memory), memory.gain, **{"most": MOST, **options})


def all_rows(memory: NetworkMemory, found: Suppression | None = None) -> np.ndarray:
    """All rows [V, M, D], with a suppression laid over them."""
    spec = MemorySpec(memory.layers, memory.width)
    records = NetworkRecords(NetworkRows(memory.network), spec, memory.width)
    if found is None:
        return records.rows(EVERY)
    spec = OverlaySpec("test", IDENTITY, memory.layers, memory.width, "f32")
    return OverlaidTable(records, [overlay_of(spec, found.edits())], VOCABULARY).rows(EVERY)


def readings(memory: NetworkMemory, rows: np.ndarray) -> np.ndarray:
    """What rows [V, M, D] add to the words' logits, [V, M, W], by the definition."""
    head = memory.network.lm_head.weight.detach().numpy().astype(np.float64)
    norm = memory.network.model.norm.weight.detach().numpy()
    directions = norm * (head[WORDS] - head.mean(axis=0))
    gain = memory_gain(memory.gain, memory.layers)
    return np.einsum("vmd,wd->vmw", rows, directions) * gain[:, None]


def turned_down(before: np.ndarray, strength: float) -> np.ndarray:
    return np.where(before > 0, (1 - strength) * before, before)


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_by_tokens_what_the_memory_adds_in_all_is_what_was_asked(
    memory: NetworkMemory, strength: float
) -> None:
    found = suppressed(memory, strength=strength)
    before = readings(memory, all_rows(memory)).sum(axis=1)
    after = readings(memory, all_rows(memory, found)).sum(axis=1)
    strongest = np.argsort(-np.maximum(before, 0).sum(axis=1))[:MOST]
    assert found.tokens.tolist() == sorted(strongest)
    assert set(found.layers) == {memory.layers - 1}
    assert after[strongest] == pytest.approx(turned_down(before[strongest], strength), abs=1e-3)
    assert found.before == pytest.approx(before[found.tokens], abs=1e-4)
    assert found.after == pytest.approx(after[found.tokens], abs=1e-3)
    assert (np.delete(after, strongest, axis=0) == np.delete(before, strongest, axis=0)).all()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_by_rows_each_row_adds_what_was_asked(memory: NetworkMemory, strength: float) -> None:
    found = suppressed(memory, by="rows", strength=strength)
    before = readings(memory, all_rows(memory))
    after = readings(memory, all_rows(memory, found))
    scores = np.maximum(before, 0).sum(axis=2)
    chosen = np.zeros(scores.shape, bool)
    chosen.ravel()[np.argsort(-scores, axis=None)[:MOST]] = True
    assert list(zip(found.tokens, found.layers, strict=True)) == list(
        zip(*np.nonzero(chosen), strict=True)
    )
    assert found.parts == len(found) == MOST
    assert after[chosen] == pytest.approx(turned_down(before[chosen], strength), abs=1e-3)
    assert found.after == pytest.approx(after[chosen], abs=1e-3)
    assert (after[~chosen] == before[~chosen]).all()


@pytest.mark.parametrize("fields", WITH_KEYS.values(), ids=WITH_KEYS)
def test_by_keys_a_row_is_the_one_computed_without_them(
    make_checkpoint: MakeCheckpoint, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suppression_module, "_BLOCK_TOKENS", 7)
    memory = network_memory(make_checkpoint(**fields))
    found = suppressed(memory, by="keys", most=60)
    assert found.parts == 60
    chosen = strongest_keys(memory, 60)
    for token, layer, change in zip(found.tokens, found.layers, found.changes, strict=True):
        keys = [key for row, at, key in chosen if (row, at) == (token, layer)]
        assert keys
        assert memory.rows(layer, np.array([token]))[0] + change == pytest.approx(
            row_without(memory, layer, token, keys), abs=1e-4
        )
    assert {(token, layer) for token, layer, _ in chosen} == set(
        zip(found.tokens, found.layers, strict=True)
    )


def strongest_keys(memory: NetworkMemory, count: int) -> list[tuple[int, int, int]]:
    """(token, layer, key) that add most to the words, out of all at once."""
    assert memory.keys is not None
    gain = memory_gain(memory.gain, memory.layers)
    scores = np.zeros((VOCABULARY, memory.layers, memory.keys))
    for layer in range(memory.layers):
        read = directions_of(memory).read(memory.values(layer)) * gain[layer]
        part = memory.coefficients(layer, EVERY)[:, :, None] * read
        scores[:, layer] = np.maximum(part, 0).sum(axis=2)
    best = np.argsort(-scores, axis=None)[:count]
    places = np.transpose(np.unravel_index(best, scores.shape))
    return [(int(token), int(layer), int(key)) for token, layer, key in places]


def row_without(memory: NetworkMemory, layer: int, token: int, keys: Sequence[int]) -> np.ndarray:
    """The network's own row of a token, the values of some keys being zero."""
    weight = memory._network(layer).down_proj.weight
    kept = weight[:, keys].clone()
    try:
        weight[:, keys] = 0
        return memory.all_rows(np.array([token]))[0, layer]
    finally:
        weight[:, keys] = kept


@pytest.mark.parametrize("by", ["tokens", "rows", "keys"])
def test_strength_zero_changes_nothing(plain_memory: NetworkMemory, by: Any) -> None:
    found = suppressed(plain_memory, by=by, strength=0.0)
    assert len(found) == found.parts == len(list(found.edits())) == 0
    assert found.promotion == (0.0, 0.0)
    assert (all_rows(plain_memory, found) == all_rows(plain_memory)).all()


@pytest.mark.parametrize("by", ["tokens", "rows", "keys"])
def test_more_than_there_is_takes_all_that_promotes(plain_memory: NetworkMemory, by: Any) -> None:
    found = suppressed(plain_memory, by=by, most=10_000_000)
    assert (found.before > 0).any(axis=1).all() or by == "keys"
    if by == "tokens":
        total = readings(plain_memory, all_rows(plain_memory, found)).sum(axis=1)
        assert total.max() < 1e-3


def test_only_the_layers_that_are_named_count_and_change(plain_memory: NetworkMemory) -> None:
    before = readings(plain_memory, all_rows(plain_memory))
    found = suppressed(plain_memory, layers=(0,))
    assert set(found.layers) == {0}
    assert found.before == pytest.approx(before[found.tokens, 0], abs=1e-4)
    assert set(suppressed(plain_memory, by="rows", layers=(1,)).layers) == {1}


def test_a_layer_without_gain_is_not_where_words_are_turned_down(
    make_checkpoint: MakeCheckpoint,
) -> None:
    memory = network_memory(make_checkpoint(memory_gain=[1.0, 0.0]))
    assert set(suppressed(memory).layers) == {0}
    assert set(suppressed(memory, by="rows").layers) == {0}
    off = suppress_words(memory, directions_of(memory), np.zeros(2, np.float32))
    assert len(off) == 0


def test_weights_say_whose_rows_matter(plain_memory: NetworkMemory) -> None:
    weights = np.zeros(VOCABULARY, np.float32)
    weights[[7, 70, 130]] = 1, 5, 2
    for by in ("tokens", "rows", "keys"):
        found = suppressed(plain_memory, by=by, weights=weights)  # type: ignore[arg-type]
        assert set(found.tokens) <= {7, 70, 130}
        assert len(found)


def test_small_chunks_give_the_same(
    plain_memory: NetworkMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = suppressed(plain_memory, by="rows")
    monkeypatch.setattr("edge_memllm.interpretation.memory._CHUNK_BYTES", 4096)
    monkeypatch.setattr(directions_module, "_CHUNK_BYTES", 4096)
    parts = suppressed(plain_memory, by="rows")
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.changes == pytest.approx(whole.changes, abs=1e-5)


def test_progress_is_told_to_the_end(plain_memory: NetworkMemory) -> None:
    told: list[tuple[str, int, int]] = []
    vocabulary_spread(plain_memory.head, lambda *step: told.append(step))
    suppressed(plain_memory, progress=lambda *step: told.append(step))
    assert {stage for stage, _, _ in told} == {"head", "memory"}
    assert all(done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2] == 2 * VOCABULARY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, r"strength is -0\.1, expected 0 \(nothing\) to 10"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"most": 0}, "most is 0, expected at least 1"),
        ({"layers": (2,)}, "layer 2 has no memory of its own"),
        ({"weights": np.ones(3)}, r"weights \[3\], expected one for each of 300"),
    ],
)
def test_what_cannot_be_is_refused(
    plain_memory: NetworkMemory, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        suppressed(plain_memory, **options)


def test_a_memory_without_keys_has_none_to_turn_down(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(memory_source="table"))
    with pytest.raises(RequestError, match="no keys"):
        suppressed(memory, by="keys")


def test_a_change_reads_as_asked_and_spares_the_vocabulary(plain_memory: NetworkMemory) -> None:
    head = plain_memory.head
    exact, spread = head.directions(WORDS), vocabulary_spread(head)
    every = head.directions(EVERY)
    assert spread == pytest.approx(every.T @ every / VOCABULARY, abs=1e-4)
    asked = np.array([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]], np.float32)
    sparing, short = WordDirections(exact, spread), WordDirections(exact)
    for each in (sparing, short):
        assert each.read(each.change(asked)) == pytest.approx(asked, abs=1e-4)
        assert not each.change(asked)[1].any()
    moved = [np.square(every @ each.change(asked)[0]).mean() for each in (sparing, short)]
    lengths = [np.square(each.change(asked)).sum() for each in (sparing, short)]
    assert moved[0] < moved[1]
    assert lengths[0] > lengths[1]


def test_words_that_a_row_cannot_tell_apart(plain_memory: NetworkMemory) -> None:
    same = plain_memory.head.directions(np.array([65, 65]))
    found = WordDirections(same)
    assert found.read(found.change(np.full((1, 2), 3, np.float32))) == pytest.approx(3, abs=1e-3)
    with pytest.raises(RequestError, match=r"33 tokens are too many .* at most 32"):
        WordDirections(plain_memory.head.directions(np.arange(33)))


def test_controls_are_as_many_and_as_long(plain_memory: NetworkMemory) -> None:
    found = suppressed(plain_memory, by="rows")
    elsewhere, turned = other_rows(found, VOCABULARY, 0), other_directions(found, 0)
    for layer in (0, 1):
        inside = found.layers == layer
        assert not np.intersect1d(elsewhere.tokens[inside], found.tokens[inside]).size
        assert len(set(elsewhere.tokens[inside])) == inside.sum()
    assert (elsewhere.changes == found.changes).all()
    assert (turned.tokens == found.tokens).all()
    lengths = np.linalg.norm(found.changes, axis=1)
    assert np.linalg.norm(turned.changes, axis=1) == pytest.approx(lengths, rel=1e-4)
    assert other_rows(found, VOCABULARY, 1).tokens.tolist() != elsewhere.tokens.tolist()
    whole = suppressed(plain_memory, most=VOCABULARY)
    assert len(set(other_rows(whole, VOCABULARY, 0).tokens)) == len(whole)
