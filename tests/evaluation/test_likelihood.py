from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm import Model, RequestError
from edge_memllm.engine.feeding import Feeder
from edge_memllm.evaluation.tasks import PairEncoder, Scorer
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import BOS, VOCABULARY, raw_byte_tokenizer
from support.small_model import byte_tokenizer, open_small_model, write_small_artifact

MOST = 16  # positions of the model's context

Tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


class Counting(FakeRuntime):
    """Counts steps and the tokens fed."""

    steps = 0
    fed = 0

    def step(self, buffer: Any, distinct: int, index: Any, *rest: Any, **more: Any) -> Any:
        self.steps += 1
        self.fed += index.size
        return super().step(buffer, distinct, index, *rest, **more)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("likelihood") / "a").path


def short(model: Model, most: int = MOST) -> Model:
    """The model with a context of few positions."""
    spec = dataclasses.replace(model.manifest.model, max_position_embeddings=most)
    model.manifest = dataclasses.replace(model.manifest, model=spec)
    return model


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with short(open_small_model(path, FakeRuntime(VOCABULARY, MOST))) as opened:
        yield opened


def plain(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-probability in its plainest form: every token from its whole history."""
    tokens = (context + continuation)[-(MOST + 1) :]
    total, greedy = 0.0, True
    for place in range(len(tokens) - len(continuation), len(tokens)):
        with Feeder(model.runtime, model.table, 1, 512) as feeder:
            logits = feeder.prefill(0, tokens[:place]).astype(np.float64)
        total += logits[tokens[place]] - np.log(np.exp(logits).sum())
        greedy = greedy and int(logits.argmax()) == tokens[place]
    return total, greedy


@settings(max_examples=40, deadline=None)
@given(context=Tokens, continuations=st.lists(Tokens, min_size=1, max_size=4))
def test_continuations_score_as_if_each_were_alone(
    model: Model, context: list[int], continuations: list[list[int]]
) -> None:
    with Scorer(model) as scorer:
        found = scorer.score(context, continuations)
        again = scorer.score(context, continuations)
    assert found == again
    for each, continuation in zip(found, continuations, strict=True):
        logprob, greedy = plain(model, context, continuation)
        assert each.logprob == pytest.approx(logprob, rel=1e-5)
        assert each.greedy == greedy
        assert each.truncated == (len(context) + len(continuation) > MOST + 1)


def test_the_likeliest_continuation_is_greedy(model: Model) -> None:
    tokens = [1, 2, 3]
    for _ in range(4):
        with Feeder(model.runtime, model.table, 1, 512) as feeder:
            tokens.append(int(feeder.prefill(0, tokens).argmax()))
    best = tokens[3:]
    with Scorer(model) as scorer:
        right, wrong = scorer.score([1, 2, 3], [best, [*best[:-1], (best[-1] + 1) % VOCABULARY]])
    assert right.greedy
    assert not wrong.greedy


def test_the_context_is_computed_once(path: Path) -> None:
    runtime = Counting(VOCABULARY, 512)
    with short(open_small_model(path, runtime), 512) as model, Scorer(model) as scorer:
        scorer.score([7] * 100, [[1, 2, 3], [4, 5], [6, 7, 8, 9]])
        assert runtime.fed == 99 + 3 + 2 + 4
        scorer.score([7] * 100, [[1], [2], [3], [4]])  # letters: one step for all of them
        assert runtime.fed == 108 + 99 + 1


def test_long_continuations_are_read_in_chunks(path: Path) -> None:
    with short(open_small_model(path, FakeRuntime(VOCABULARY, 512)), 512) as model:
        long = [n % VOCABULARY for n in range(1, 200)]
        with Scorer(model) as scorer:
            whole, first = scorer.score([0], [long, long[:70]])
            (rest,) = scorer.score([0, *long[:70]], [long[70:]])
    assert whole.logprob == pytest.approx(first.logprob + rest.logprob, rel=1e-6)


def test_a_continuation_that_cannot_fit_is_refused(model: Model) -> None:
    with Scorer(model) as scorer:
        scorer.score([1], [[2] * MOST])
        with pytest.raises(RequestError, match="has 17 tokens and the model's context holds 16"):
            scorer.score([1], [[2] * (MOST + 1)])


# from text to tokens


@pytest.fixture(scope="module")
def encoder(model: Model) -> PairEncoder:
    return PairEncoder(byte_tokenizer(), model.manifest.model)


def text_of(tokens: list[int]) -> str:
    return byte_tokenizer().decode(tokens)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("The sky is", " blue", ("The sky is", " blue")),
        ("Answer: ", "blue", ("Answer:", " blue")),
        ("Question\n ", "blue", ("Question", "\n blue")),
    ],
)
def test_white_space_goes_to_the_continuation(
    encoder: PairEncoder, context: str, continuation: str, expected: tuple[str, str]
) -> None:
    pair = encoder.pair(context, continuation)
    assert (text_of(pair.context), text_of(pair.continuation)) == expected


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_without_a_context_there_is_the_start_of_a_text(encoder: PairEncoder, context: str) -> None:
    pair = encoder.pair(context, "blue")
    assert pair.context == [BOS]
    assert text_of(pair.continuation) == context + "blue"


def test_a_start_that_is_written_out_is_not_put_there_twice(encoder: PairEncoder) -> None:
    pair = encoder.pair("", "<s>blue")
    assert pair.context == [BOS]
    assert text_of(pair.continuation) == "blue"


def test_a_tokenizer_that_puts_the_start_in_front(model: Model) -> None:
    from tokenizers.processors import TemplateProcessing

    made = raw_byte_tokenizer()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    encoder = PairEncoder(Tokenizer(made.to_str().encode()), model.manifest.model)
    plain = byte_tokenizer().encode("sky")
    assert encoder.text("sky") == encoder.text("<s>sky") == [BOS, *plain]
    assert encoder.pair("sky", " blue").context == [BOS, *plain]
    assert encoder.pair("", " blue").continuation == byte_tokenizer().encode(" blue")


def test_nothing_to_predict_is_refused(encoder: PairEncoder) -> None:
    with pytest.raises(RequestError, match="behind 'sky' gives no token to predict"):
        encoder.pair("sky", "")


def test_a_model_without_a_start_needs_a_context(model: Model) -> None:
    spec = dataclasses.replace(model.manifest.model, bos_token_id=None, eos_token_ids=())
    encoder = PairEncoder(byte_tokenizer(), spec)
    assert text_of(encoder.pair("sky", " blue").context) == "sky"
    with pytest.raises(RequestError, match="the model has no token that starts a text"):
        encoder.pair("", "blue")


def test_tokens_the_model_does_not_have_are_refused(model: Model) -> None:
    spec = dataclasses.replace(model.manifest.model, vocab_size=50)
    with pytest.raises(RequestError, match="expected an integer from 0 to 49"):
        PairEncoder(byte_tokenizer(), spec).text("sky")
