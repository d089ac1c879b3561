"""Prompt lookup: what is proposed, and that drafts never change a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_memllm
from edge_memllm import Model, Sampling
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import StepCosts
from edge_memllm.engine.generation import (
    ENDINGS,
    FIRST_DRAFTS,
    FIRST_REST,
    LONGEST_REST,
    MISSES_BEFORE_REST,
    PromptLookup,
    TokenSequence,
)
from edge_memllm.sampling import Sampler
from edge_memllm.table.table import Table
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import EOS, VOCABULARY, MakeArtifact
from support.generation import tokens_of
from support.small_model import CONTEXT, open_small_model, write_small_artifact

# What is proposed


def lookup(text: list[int], most: int = 8) -> PromptLookup:
    made = PromptLookup(most)
    made.extend(text)
    return made


def searched(text: list[int], count: int) -> list[int]:
    """What the index must find, by looking through the whole text."""
    for length in ENDINGS:
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                drafts = list(text)
                for step in range(count):
                    drafts.append(drafts[place + step])
                return drafts[len(text) :]
    return []


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, FIRST_DRAFTS))
def test_the_longest_ending_proposes_what_followed_it_last(text: list[int], limit: int) -> None:
    assert lookup(text).propose(limit) == searched(text, limit)


def test_nothing_is_proposed_where_the_text_is_new() -> None:
    for text in ([], [1], [1, 2, 3, 4, 5], [1, 2, 3, 1, 2]):
        assert lookup(text).propose(4) == []


def test_a_pattern_goes_on_behind_the_end_of_the_text() -> None:
    assert lookup([9, 1, 2, 1, 2, 1]).propose(4) == [2, 1, 2, 1]
    assert lookup([7, 7, 7, 7]).propose(3) == [7, 7, 7]


@pytest.mark.parametrize("limit", [-1, 0, 1, 2])
def test_no_more_than_the_limit(limit: int) -> None:
    assert len(lookup([1, 2, 1, 2, 1]).propose(limit)) == max(0, limit)


def test_right_drafts_make_more_and_wrong_ones_fewer() -> None:
    made = lookup([7] * 5, most=12)
    found = []
    for right in (1.0, 1.0, 0.5, 1.0, 0.0, 1.0):
        drafts = made.propose(99)
        found.append(len(drafts))
        made.learn(len(drafts), int(right * len(drafts)))
    assert found == [4, 8, 12, 6, 12, 1]


def test_repeated_misses_bring_longer_and_longer_rests() -> None:
    made = lookup([7] * 5)
    rests = []
    for _ in range(8):
        waited = 0
        while not (drafts := made.propose(9)):
            made.learn(0, 0)
            waited += 1
        rests.append(waited)
        made.learn(len(drafts), 0)
    first = [0] * MISSES_BEFORE_REST
    doubled = [min(FIRST_REST << n, LONGEST_REST) for n in range(8 - len(first))]
    assert rests == first + doubled
    assert doubled[-1] == LONGEST_REST
    while not (drafts := made.propose(9)):
        pass
    made.learn(1, 1)
    made.learn(1, 0)
    made.learn(1, 0)
    assert [bool(made.propose(1)) for _ in range(FIRST_REST + 1)] == [False] * FIRST_REST + [True]


# That it changes nothing


class Repetitive(FakeRuntime):
    """Has only a few answers, so that its texts repeat themselves and drafts are often right.

    Which answer it gives still depends on the whole history: a text goes wrong at once if the
    cache keeps a rejected draft.
    """

    def __init__(self, answers: int, window: int | None = None, rows: int = 0) -> None:
        super().__init__(VOCABULARY, CONTEXT, window=window, rows=rows)
        self.answers = answers
        self.steps: list[tuple[int, int]] = []  # tokens, distinct

    def step(self, buffer: Any, distinct: int, index: Any, *rest: Any, **more: Any) -> Any:
        self.steps.append((index.size, distinct))
        return super().step(buffer, distinct, index, *rest, **more)

    def logits(self, state: int) -> Any:
        return super().logits(state % self.answers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("speculation") / "artifact").path


@pytest.fixture(scope="module")
def table(folder: Path) -> Iterator[Table]:
    with Artifact.open(folder) as artifact:
        opened = Table.open(artifact, "pread")
        yield opened
        opened.close()


SAMPLINGS = [
    {},
    {"repetition_penalty": 1.2},
    {"temperature": 0.4, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 9, "repetition_penalty": 1.1},
]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 299), min_size=1, max_size=30),
    answers=st.integers(1, 5),
    speculate=st.integers(1, 20),
    limit=st.integers(1, 60),
    sampling=st.sampled_from(SAMPLINGS),
    ends=st.sets(st.integers(0, 299), max_size=60),
    rolling=st.sampled_from([(None, 0), (2, 2), (8, 8), (8, 9), (8, 15), (12, 40)]),
)
def test_drafts_change_no_token(
    table: Table,
    prompt: list[int],
    answers: int,
    speculate: int,
    limit: int,
    sampling: Any,
    ends: set[int],
    rolling: tuple[int | None, int],
) -> None:
    found = []
    for drafts in (0, speculate):
        sampler = Sampler(Sampling(**sampling), 5)
        sequence = TokenSequence(prompt, sampler, limit, frozenset(ends))
        given = list(tokens_of(Repetitive(answers, *rolling), table, sequence, speculate=drafts))
        assert given == sequence.tokens
        found.append((sequence.tokens, sequence.finish_reason))
    assert found[0] == found[1]


@settings(max_examples=40, deadline=None)
@given(stop=st.text("ab", min_size=1, max_size=4), seed=st.integers(0, 99))
def test_stop_strings_end_the_text_where_they_did(folder: Path, stop: str, seed: int) -> None:
    class Letters(Repetitive):
        def logits(self, state: int) -> Any:
            logits = np.full(VOCABULARY, -60, np.float32)
            logits[model.tokenize("ab")] = np.random.default_rng(state % 9).uniform(0, 3, 2)
            return logits

    with open_small_model(folder, Letters(1)) as model:
        options: dict[str, Any] = {"stop": stop, "seed": seed, "max_new_tokens": 60}
        options["sampling"] = Sampling(temperature=0.7)
        plain = list(model.stream("aab", **options))
        drafted = list(model.stream("aab", speculate=6, **options))
    assert [(each.text, each.token, each.finish_reason) for each in drafted] == [
        (each.text, each.token, each.finish_reason) for each in plain
    ]


def test_a_text_still_ends_with_the_context(folder: Path) -> None:
    with open_small_model(folder, Repetitive(1)) as model:
        for length in (CONTEXT - 3, CONTEXT - 1, CONTEXT):
            pieces = list(model.stream([4] * length, speculate=9, ignore_eos=True))
            assert len(pieces) == CONTEXT - length + 1
            assert pieces[-1].finish_reason == "length"


def test_right_drafts_save_steps_and_are_counted(table: Table) -> None:
    runtime, costs = Repetitive(1), StepCosts()
    sequence = TokenSequence([4, 4, 4], Sampler(Sampling(), 0), 40)
    list(tokens_of(runtime, table, sequence, speculate=8, costs=costs))
    assert len(sequence.tokens) == 40
    assert len(runtime.steps) < 12
    assert costs.accepted_tokens == 40 - len(runtime.steps)
    assert costs.accepted_tokens <= costs.draft_tokens
    assert costs.decode_tokens == 39
    assert max(tokens for tokens, _ in runtime.steps) == 9
    assert runtime.steps[-1][1] <= 2  # equal drafts are read once
    assert costs.records_read == sum(distinct for _, distinct in runtime.steps)


def test_statistics_tell_of_drafts(folder: Path) -> None:
    with open_small_model(folder, Repetitive(1)) as model:
        options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
        *_, plain = model.stream("aaa", **options)
        *_, last = model.stream("aaa", speculate=8, **options)
    assert plain.statistics is not None
    assert last.statistics is not None
    assert (plain.statistics.draft_tokens, plain.statistics.accepted_tokens) == (0, 0)
    assert 20 < last.statistics.accepted_tokens <= last.statistics.draft_tokens
    assert last.statistics.completion_tokens == 30


def test_leaving_in_the_middle_of_a_round_frees_the_cache(folder: Path) -> None:
    with open_small_model(folder, Repetitive(1)) as model:
        caches: list[Any] = []
        new_cache = model.runtime.new_cache
        model.runtime.new_cache = lambda batch: caches.append(new_cache(batch)) or caches[-1]  # type: ignore[method-assign,func-returns-value]
        stream = model.stream("aaa", speculate=8, ignore_eos=True)
        for _ in range(8):
            next(stream)
        stream.close()
        assert caches[0].closed


# In ONNX Runtime


@pytest.fixture(scope="module")
def exported(make_artifact: MakeArtifact) -> Iterator[Model]:
    path = make_artifact(graph_weights="fp32", table_codec="f32")
    with edge_memllm.load(path, device="cpu", threads=1) as model:
        yield model


@pytest.mark.parametrize("speculate", [1, 4, 16])
@pytest.mark.parametrize("sampling", [{}, *SAMPLINGS[1:]])
def test_a_real_graph_gives_the_text_it_gives_without_drafts(
    exported: Model, speculate: int, sampling: Any
) -> None:
    accepted = 0
    for seed, prompt in enumerate(("", "one and one and one and", "abcabcabc", "\x00\x01\x00\x01")):
        options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "seed": seed}
        options["sampling"] = Sampling(**sampling)
        plain = [piece.token for piece in exported.stream(prompt, **options)]
        pieces = list(exported.stream(prompt, speculate=speculate, **options))
        assert [piece.token for piece in pieces] == plain
        assert pieces[-1].statistics is not None
        accepted += pieces[-1].statistics.accepted_tokens
    if not sampling:
        assert accepted > 0
    assert EOS < VOCABULARY
