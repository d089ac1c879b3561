from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm import Model, RequestError
from edge_memllm.evaluation import combine_divergences, measure_divergence, measure_perplexity
from edge_memllm.evaluation import perplexity as divergence
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import BOS, VOCABULARY, raw_byte_tokenizer
from support.small_model import CONTEXT, open_small_model, write_small_artifact

TEXT = "It was a dark and stormy night; the rain fell in torrents."


class Bolder(FakeRuntime):
    """The same model with all logits doubled: as sure of the same tokens, but more so."""

    def step(self, *arguments: Any, **more: Any) -> Any:
        return super().step(*arguments, **more) * 2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("divergence") / "a").path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with open_small_model(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def bolder(path: Path) -> Iterator[Model]:
    with open_small_model(path, Bolder(VOCABULARY, CONTEXT)) as opened:
        yield opened


def softmax(logits: Any) -> Any:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(axis=1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(2, 50), st.integers(0, 2**32 - 1))
def test_divergence_is_its_definition(rows: int, vocabulary: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth, found = random.normal(0, 3, (2, rows, vocabulary)).astype(np.float32)
    p, q = softmax(truth), softmax(found)
    expected = (p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(divergence.divergences(truth, found), expected, atol=1e-12)
    assert (divergence.divergences(truth, truth) == 0).all()


def test_large_vocabularies_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = np.random.default_rng(0).normal(0, 3, (2, 7, 30)).astype(np.float32)
    whole = divergence.divergences(truth, found)
    monkeypatch.setattr(divergence, "_BLOCK_VALUES", 65)
    np.testing.assert_array_equal(divergence.divergences(truth, found), whole)


def test_a_model_does_not_differ_from_itself(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    found = measure_divergence(
        model, model, TEXT, context=20, stride=5, progress=lambda *counts: seen.append(counts)
    )
    assert (found.kl == 0).all()
    assert found.top1_agreement == 1
    assert found.perplexity_increase == 0
    alone = measure_perplexity(model, TEXT, context=20, stride=5)
    assert found.model.nll == pytest.approx(alone.nll)
    assert dataclasses.replace(found.model, nll=alone.nll) == alone
    assert seen[-1] == (len(TEXT), len(TEXT))


def test_the_figures_of_a_known_difference(model: Model, bolder: Model) -> None:
    found = measure_divergence(bolder, model, TEXT)
    ids = [BOS, *model.tokenizer.encode(TEXT)]
    logits = plain_logits(model, ids[:-1])
    p, q = softmax(logits), softmax(logits * 2)
    expected = (p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-5)
    figures = found.as_dict()
    assert figures["mean_kl"] == pytest.approx(expected.mean(), rel=1e-5)
    assert figures["median_kl"] == pytest.approx(np.median(expected), rel=1e-5)
    assert figures["p99_kl"] == pytest.approx(np.quantile(expected, 0.99), rel=1e-5)
    assert figures["max_kl"] == pytest.approx(expected.max(), rel=1e-5)
    assert figures["top1_agreement"] == 1  # doubled logits have the same largest one
    loss = -np.log(q[np.arange(len(ids) - 1), ids[1:]]).mean()
    assert found.model.nll_per_token == pytest.approx(loss, rel=1e-5)
    assert found.reference.nll == pytest.approx(measure_perplexity(model, TEXT).nll)
    assert figures["perplexity_increase"] == pytest.approx(
        math.exp(loss - found.reference.nll_per_token) - 1, rel=1e-4
    )
    assert figures["tokens"] == len(TEXT)


def plain_logits(model: Model, ids: list[int]) -> Any:
    from edge_memllm.engine.feeding import Feeder

    with Feeder(model.runtime, model.table, 1, 512) as feeder:
        return feeder.score(0, ids).copy()


def test_texts_together_count_every_token_once(model: Model, bolder: Model) -> None:
    parts = [measure_divergence(bolder, model, text) for text in (TEXT, "Something else.")]
    both = combine_divergences(parts)
    assert both.model.tokens == len(both.kl) == len(TEXT) + 15
    assert both.as_dict()["mean_kl"] == pytest.approx(np.concatenate([p.kl for p in parts]).mean())
    assert both.agreeing == sum(part.agreeing for part in parts)


def test_another_tokenizer_is_refused(model: Model, tmp_path: Path) -> None:
    text = raw_byte_tokenizer().to_str().encode().replace(b'"<pad>"', b'"<nul>"')
    made = write_small_artifact(tmp_path / "b", tokenizer__json=text)
    with (
        open_small_model(made.path) as reference,
        pytest.raises(RequestError, match=r"tokenizer\.json of the reference is not the model's"),
    ):
        measure_divergence(model, reference, TEXT)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bos_token_id", 257, "start with token 256 in the model and 257 in the reference"),
        ("vocab_size", 301, "The model has 300 tokens and the reference 301"),
    ],
)
def test_tokens_that_mean_something_else_are_refused(
    model: Model, path: Path, field: str, value: int, message: str
) -> None:
    with open_small_model(path) as reference:
        manifest = reference.manifest
        spec = dataclasses.replace(manifest.model, **{field: value})
        reference.manifest = dataclasses.replace(manifest, model=spec)
        with pytest.raises(RequestError, match=message):
            measure_divergence(model, reference, TEXT)
