"""Tokens with the most similar memory, against cosines of everything with everything."""

from __future__ import annotations

import numpy as np
import pytest

from edge_memllm import RequestError
from edge_memllm.interpretation import memory as features_module
from edge_memllm.interpretation.keys import similar_tokens
from edge_memllm.text.token_texts import TokenTexts
from support.checkpoints import VOCABULARY, MakeCheckpoint
from support.interpretation import network_memory
from support.small_model import byte_tokenizer

EVERY = np.arange(VOCABULARY)
TEXTS = TokenTexts(byte_tokenizer(), VOCABULARY)


@pytest.mark.parametrize("source", ["ffn", "table"])
def test_the_most_similar_come_first(
    source: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "_CHUNK_BYTES", 1 << 14)
    memory = network_memory(make_checkpoint(memory_source=source))
    compared = memory.coefficients if memory.keys else memory.rows
    found = similar_tokens(memory, [65, 66, 65], texts=TEXTS, layers=[1, 0], count=5)
    assert [(each.token.id, each.layer) for each in found] == [
        (65, 1),
        (65, 0),
        (65, None),
        (66, 1),
        (66, 0),
        (66, None),
    ]
    assert {each.features for each in found} == {"coefficients" if memory.keys else "rows"}
    cosines = {}
    for layer in (0, 1):
        vectors = compared(layer, EVERY).astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines[layer] = vectors @ vectors.T
    cosines[None] = (cosines[0] + cosines[1]) / 2
    for each in found:
        right = cosines[each.layer][each.token.id].copy()
        right[each.token.id] = -2
        order = np.argsort(-right)[:5]
        assert [one.token.id for one in each.similar] == order.tolist()
        assert [one.value for one in each.similar] == pytest.approx(right[order], abs=1e-5)


def test_one_layer_needs_no_mean_and_a_vocabulary_has_an_end(
    make_checkpoint: MakeCheckpoint,
) -> None:
    memory = network_memory(make_checkpoint())
    (only,) = similar_tokens(memory, [65], texts=TEXTS, layers=[1], count=VOCABULARY + 9)
    assert only.layer == 1
    others = [each.token.id for each in only.similar]
    assert sorted([*others, 65]) == EVERY.tolist()


def test_progress_counts_every_token_once_in_each_layer(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint())
    seen: list[tuple[str, int, int]] = []
    similar_tokens(memory, [65], texts=TEXTS, layers=[0, 1], progress=lambda *at: seen.append(at))
    assert seen[-1] == ("similar", 2 * VOCABULARY, 2 * VOCABULARY)


def test_what_is_not_there_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint())
    with pytest.raises(RequestError, match="expected an integer from 0 to 299"):
        similar_tokens(memory, [VOCABULARY], texts=TEXTS, layers=[0])
    with pytest.raises(RequestError, match="layer 2 has no memory"):
        similar_tokens(memory, [1], texts=TEXTS, layers=[2])
    with pytest.raises(RequestError, match="count is 0"):
        similar_tokens(memory, [1], texts=TEXTS, layers=[0], count=0)
