"""Tokens to keys and keys to tokens, against the plain sums over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm import RequestError
from edge_memllm.interpretation import head as head_module
from edge_memllm.interpretation import keys as keys_module
from edge_memllm.interpretation.explaining import open_subject
from edge_memllm.interpretation.head import Highest
from edge_memllm.interpretation.keys import key_cards, token_cards
from edge_memllm.text.token_texts import TokenTexts
from support.checkpoints import VOCABULARY, MakeArtifact, MakeCheckpoint
from support.interpretation import network_memory
from support.small_model import byte_tokenizer

EVERY = np.arange(VOCABULARY)
TEXTS = TokenTexts(byte_tokenizer(), VOCABULARY)


def scores(found: Any) -> list[tuple[int, float]]:
    return [(each.token.id, each.value) for each in found]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary in parts, as that of a large model comes."""
    monkeypatch.setattr(keys_module, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(head_module, "_CHUNK_BYTES", 4096)


@pytest.mark.usefixtures("small_chunks")
def test_a_key_card_holds_the_extremes_of_the_vocabulary(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(beta=1))
    cards = key_cards(memory, memory.head, [(1, 9), (0, 2), (1, 4), (0, 2)], TEXTS, count=6)
    assert list(cards) == [(1, 9), (0, 2), (1, 4)]
    head = memory.network.lm_head.weight.detach().numpy()
    for (layer, key), card in cards.items():
        assert (card.layer, card.key) == (layer, key)
        fired = memory.coefficients(layer, EVERY)[:, key]
        order = np.argsort(-fired, kind="stable")
        assert [token for token, _ in scores(card.fires)] == order[:6].tolist()
        assert [value for _, value in scores(card.fires)] == pytest.approx(fired[order[:6]])
        assert [token for token, _ in scores(card.inverts)] == order[::-1][:6].tolist()
        assert all(value < 0 for _, value in scores(card.inverts))
        added = head @ (memory.values(layer)[key] * memory.head.norm)
        added -= added.mean()
        order = np.argsort(-added, kind="stable")
        assert [token for token, _ in scores(card.promotes)] == order[:6].tolist()
        assert [token for token, _ in scores(card.suppresses)] == order[::-1][:6].tolist()
        lowest = [value for _, value in scores(card.suppresses)]
        assert lowest == pytest.approx(added[order[::-1][:6]], abs=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_a_token_card_shows_its_strongest_keys(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(memory_source="both"))
    tokens = [65, 299]
    cards = token_cards(memory, memory.head, tokens, TEXTS, layers=[1, 0], keys=3, count=4)
    assert [card.token.id for card in cards] == tokens
    for card in cards:
        assert [use.layer for use in card.layers] == [1, 0]
        for use in card.layers:
            ids = np.array([card.token.id])
            row = memory.rows(use.layer, ids)[0]
            assert use.norm == pytest.approx(np.linalg.norm(row), rel=1e-5)
            coefficients = memory.coefficients(use.layer, ids)[0]
            parts = coefficients[:, None] * memory.values(use.layer)
            made = parts.sum(axis=0)
            shares = parts @ made / (made @ made)
            order = np.argsort(-np.abs(shares), kind="stable")[:3]
            assert [key.card.key for key in use.keys] == order.tolist()
            assert [key.share for key in use.keys] == pytest.approx(shares[order], abs=1e-5)
            assert [key.coefficient for key in use.keys] == pytest.approx(coefficients[order])
            (reading,) = memory.head.read(row[None], 4)
            assert [token for token, _ in scores(use.promotes)] == reading.promotes[0].tolist()


def test_what_a_row_promotes_is_what_it_adds_to_the_logits(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint())
    (use,) = token_cards(memory, memory.head, [65], TEXTS, layers=[0], keys=1, count=VOCABULARY)[
        0
    ].layers
    row = memory.rows(0, np.array([65]))[0]
    added = dict(scores(use.promotes))
    assert sum(added.values()) == pytest.approx(0, abs=1e-3)
    for token in (0, 17, 299):
        direction = memory.head.directions(np.array([token]))[0]
        assert added[token] == pytest.approx(row @ direction, abs=1e-4)


def test_rows_without_keys_have_a_card_all_the_same(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(memory_source="table"))
    (card,) = token_cards(memory, memory.head, [65], TEXTS, layers=[0, 1], keys=2, count=2)
    for use in card.layers:
        assert use.keys == ()
        assert use.keys_for_half is None
        assert len(use.promotes) == 2


def test_a_list_never_shows_a_token_that_does_not_fire_the_key() -> None:
    class Silent:
        """Two keys: one fires on no token, one on all."""

        layers, keys, width, vocabulary = 1, 2, 4, VOCABULARY

        def coefficients(self, layer: int, ids: np.ndarray, keys: Any) -> np.ndarray:
            return np.tile(np.array([0.0, 1.0], np.float32)[list(keys)], (len(ids), 1))

        def values(self, layer: int, keys: Any) -> np.ndarray:
            return np.ones((len(keys), 4), np.float32)

    flat = head_module.Head(
        lambda ids: np.ones((len(ids), 4), np.float32), VOCABULARY, np.ones(4, np.float32)
    )
    silent, loud = key_cards(Silent(), flat, [(0, 0), (0, 1)], TEXTS, count=3).values()
    assert silent.fires == silent.inverts == loud.inverts == ()
    assert scores(loud.fires) == [(0, 1.0), (1, 1.0), (2, 1.0)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((2, 0), "layer 2 has no memory of its own"),
        ((0, 10_000), r"key 10000 is not in layer 0, which has 0 to \d+"),
    ],
)
def test_what_is_not_there_is_refused(
    asked: tuple[int, int], message: str, make_checkpoint: MakeCheckpoint
) -> None:
    memory = network_memory(make_checkpoint())
    with pytest.raises(RequestError, match=message):
        key_cards(memory, memory.head, [asked], TEXTS, count=2)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_the_highest_are_the_same_however_the_rows_come(
    values: list[int], count: int, part: int, shuffler: Any
) -> None:
    column = np.array(values, np.float32)
    order = np.array(shuffler.sample(range(len(values)), len(values)))
    found = Highest(count, 2)
    for start in range(0, len(order), part):
        ids = order[start : start + part]
        found.add(ids, np.stack([column[ids], -column[ids]], axis=1))
    for place, each in enumerate((column, -column)):
        best = np.lexsort((np.arange(len(each)), -each))[:count]
        assert found.ids[:, place].tolist() == best.tolist()
        assert found.values[:, place].tolist() == each[best].tolist()


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_artifact_reads_rows_through_its_own_head(
    weights: str, tied: bool, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    memory = network_memory(make_checkpoint(tie_word_embeddings=tied))
    with open_subject(
        make_artifact(graph_weights=weights, table_codec="f32", tie_word_embeddings=tied)
    ) as subject:
        exact, found = (each.directions(EVERY) for each in (memory.head, subject.head))
        tolerance = {"fp32": 1e-6, "int8": 0.02, "int4": 0.25}[weights]
        np.testing.assert_allclose(found, exact, atol=tolerance)
        (card,) = token_cards(
            subject.memory, subject.head, [65], subject.texts, layers=[0, 1], keys=2, count=3
        )
        assert all(use.keys == () for use in card.layers)
        norms = [np.linalg.norm(memory.rows(layer, np.array([65]))) for layer in (0, 1)]
        assert [use.norm for use in card.layers] == pytest.approx(norms, rel=1e-4)
