from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_memllm
from edge_memllm import Model, RequestError
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.evaluation.perplexity import Perplexity, combine, measure_perplexity, token_losses
from edge_memllm.sampling import next_token_losses
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import BOS, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.small_model import CONTEXT, open_small_model, write_small_artifact

TEXT = "It was a dark and stormy night; the rain fell in torrents — except at intervals."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = write_small_artifact(tmp_path_factory.mktemp("perplexity") / "a")
    with open_small_model(made.path) as opened:
        yield opened


def loss_of(model: Model, history: list[int], target: int) -> float:
    """The loss of one token in its plainest form."""
    with Feeder(model.runtime, model.table, 1, 512) as feeder:
        logits = feeder.prefill(0, history).astype(np.float64)
    return float(np.log(np.exp(logits).sum()) - logits[target])


def losses(model: Model, tokens: list[int], context: int, stride: int) -> list[float]:
    parts = token_losses(model.runtime, model.table, tokens, context=context, stride=stride)
    return [loss for part in parts for loss in part.tolist()]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=40),
    context=st.integers(1, 45),
    data=st.data(),
)
def test_each_token_is_predicted_once_from_its_window(
    model: Model, tokens: list[int], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    expected = []
    for place in range(1, len(tokens)):
        # The first window that reaches the token is the one that predicts it.
        window = 0 if place <= context else math.ceil((place - context) / stride)
        history = tokens[window * stride : place]
        assert len(history) >= min(place, context - stride + 1)
        expected.append(loss_of(model, history, tokens[place]))
    np.testing.assert_allclose(losses(model, tokens, context, stride), expected, rtol=1e-5)


def test_windows_longer_than_a_chunk_are_read_in_chunks(model: Model) -> None:
    tokens = [(n * n) % VOCABULARY for n in range(200)]
    found = losses(model, tokens, 100, 100)
    expected = [loss_of(model, tokens[p // 101 * 100 : p], tokens[p]) for p in (1, 64, 65, 100)]
    np.testing.assert_allclose([found[p - 1] for p in (1, 64, 65, 100)], expected, rtol=1e-5)
    assert len(found) == 199


def test_the_figures_fit_together(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    found = measure_perplexity(
        model, TEXT, context=20, stride=10, progress=lambda *counts: seen.append(counts)
    )
    ids = model.tokenizer.encode(TEXT)
    total = sum(losses(model, [BOS, *ids], 20, 10))
    assert found.tokens == len(ids) == found.bytes == len(TEXT.encode())
    assert found.nll_per_token == pytest.approx(total / len(ids))
    assert found.perplexity == pytest.approx(math.exp(total / len(ids)))
    assert found.words == len(TEXT.split()) == 16
    assert found.nll_per_byte == pytest.approx(total / found.bytes)
    assert found.bits_per_byte == pytest.approx(found.nll_per_byte / math.log(2))
    assert found.byte_perplexity == pytest.approx(2**found.bits_per_byte)
    assert found.word_perplexity == pytest.approx(math.exp(total / 16))
    assert (found.context, found.stride) == (20, 10)
    assert seen[-1] == (len(ids), len(ids))
    assert found.as_dict()["tokens"] == found.tokens
    assert found.as_dict()["word_perplexity"] == found.word_perplexity


def test_of_several_texts_every_token_counts_once() -> None:
    found = combine([Perplexity(20.0, 10, 40, 8, 8, 4), Perplexity(150.0, 30, 80, 12, 8, 4)])
    assert found == Perplexity(170.0, 40, 120, 20, 8, 4)
    assert found.nll_per_token == 170 / 40


def test_a_figure_too_large_for_a_float_stays_one() -> None:
    assert math.isfinite(Perplexity(1e5, 1, 0, 0, 8, 4).word_perplexity)


def test_whole_context_and_half_as_stride_are_the_default(model: Model) -> None:
    found = measure_perplexity(model, TEXT)
    assert (found.context, found.stride) == (CONTEXT, CONTEXT // 2)


def test_without_a_token_to_start_from_the_first_is_not_predicted(tmp_path: Path) -> None:
    import dataclasses

    made = write_small_artifact(tmp_path / "a")
    spec = dataclasses.replace(made.manifest.model, bos_token_id=None, eos_token_ids=())
    with edge_memllm_files(made.path, spec) as model:
        found = measure_perplexity(model, "a" + TEXT)
        assert found.tokens == found.bytes == len(TEXT.encode())
        with pytest.raises(RequestError, match="The text has 1 tokens and none can be predicted"):
            measure_perplexity(model, "a")


def edge_memllm_files(path: Path, spec: Any) -> Model:
    import dataclasses

    from edge_memllm.artifact.folder import Artifact

    with Artifact.open(path) as artifact:
        changed = dataclasses.replace(artifact.manifest, model=spec)
    (path / "manifest.json").write_bytes(changed.to_json())
    return open_small_model(path)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ({"context": 0}, "context is 0, expected 1 to the model's 128"),
        ({"context": 129}, "context is 129, expected"),
        ({"context": 10, "stride": 11}, "stride is 11, expected 1 to the context, 10"),
        ({"stride": 0}, "stride is 0, expected"),
    ],
)
def test_impossible_windows_are_refused(
    model: Model, windows: dict[str, int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        measure_perplexity(model, TEXT, **windows)


def test_a_text_with_nothing_to_predict_is_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="The text has 0 tokens and none can be predicted"):
        measure_perplexity(model, "")


def test_logits_that_are_not_finite_are_an_error(model: Model) -> None:
    class Overflowing(FakeRuntime):
        def step(self, *arguments: Any, **more: Any) -> Any:
            logits = super().step(*arguments, **more)
            logits[..., 7] = np.inf
            return logits

    runtime = Overflowing(VOCABULARY, CONTEXT)
    with pytest.raises(EdgeMemLLMError, match="logits are NaN or infinite"):
        list(token_losses(runtime, model.table, [1, 2, 3], context=8, stride=4))


def test_even_logits_give_the_size_of_the_vocabulary() -> None:
    found = next_token_losses(np.zeros((3, 50), np.float32), [0, 10, 49])
    np.testing.assert_allclose(np.exp(found), 50)


def test_it_is_the_loss_that_torch_computes(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    torch = pytest.importorskip("torch")
    from edge_memllm.modeling import MemoryLLMForCausalLM

    network = MemoryLLMForCausalLM.from_pretrained(make_checkpoint())
    with edge_memllm.load(make_artifact(graph_weights="fp32", table_codec="f32")) as exported:
        found = measure_perplexity(exported, TEXT)
        ids = torch.tensor([[BOS, *exported.tokenize(TEXT)]])
    with torch.no_grad():
        expected = float(network(ids, labels=ids).loss)
    assert found.nll_per_token == pytest.approx(expected, rel=1e-5)
