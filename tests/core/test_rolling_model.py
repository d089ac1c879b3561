"""What people do with a model whose layers keep a window only: it answers as one that keeps all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm import Model, Sampling
from edge_memllm.engine import Engine, Request
from edge_memllm.evaluation.tasks import Scorer
from edge_memllm.memory_plan import footprint, position_bytes, window_bytes
from edge_memllm.statistics import ProcessMemory
from support.graphs import change_graph, manifest_of, refused
from support.rolling import CONTEXT, ROWS, WINDOW, export_rolling
from support.runtimes import pretend_cuda

GREEDY = Sampling(temperature=0.0)
LONG = np.random.default_rng(0).integers(0, 250, 200).tolist()
REPEATED = [*LONG[:40], *LONG[:40], *LONG[:40], *LONG[:20]]
SHORT = LONG[: WINDOW + 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return export_rolling(tmp_path_factory.mktemp("rolling"), graph_weights="fp32")


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> Iterator[tuple[Model, Model]]:
    rolling, whole = folders
    with (
        edge_memllm.load(rolling, threads=1) as first,
        edge_memllm.load(whole, threads=1) as second,
    ):
        yield first, second


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return export_rolling(tmp_path_factory.mktemp("half"), graph_weights="fp16")


def tokens(model: Model, prompt: list[int], count: int, **more: int) -> list[int]:
    pieces = model.stream(prompt, max_new_tokens=count, sampling=GREEDY, ignore_eos=True, **more)
    return [piece.token for piece in pieces]


@pytest.mark.parametrize("prompt", [SHORT, LONG, REPEATED], ids=["short", "long", "repeated"])
@pytest.mark.parametrize("speculate", [0, 7])
def test_texts_are_the_same(prompt: list[int], speculate: int, models: tuple[Model, Model]) -> None:
    rolling, whole = models
    expected = tokens(whole, prompt, 150)
    assert tokens(rolling, prompt, 150, speculate=speculate) == expected


def test_a_batch_is_the_same(models: tuple[Model, Model]) -> None:
    prompts = [SHORT, LONG, LONG[50:59]]
    first, second = (
        model.generate(prompts, max_new_tokens=90, sampling=GREEDY) for model in models
    )
    assert first == second


def test_a_session_goes_back_and_on_however_far(
    models: tuple[Model, Model], tmp_path: Path
) -> None:
    found = []
    for model in models:
        with model.session(sampling=GREEDY) as session:
            session.append(LONG)
            texts = [session.generate(max_new_tokens=30, ignore_eos=True)]
            for left in (228, 215, 200, 150, 20):
                session.rewind(left)
                texts.append(session.generate(max_new_tokens=12, ignore_eos=True))
            session.append(LONG)
            session.prefill()
            with session.fork() as other:
                texts.append(other.generate(max_new_tokens=12, ignore_eos=True))
            session.save(tmp_path / "saved", overwrite=True)
            with model.restore_session(tmp_path / "saved") as restored:
                assert restored.computed == session.computed
                texts += [
                    each.generate(max_new_tokens=30, ignore_eos=True)
                    for each in (session, restored)
                ]
                assert texts[-1] == texts[-2]
                restored.rewind(len(restored) - 20)
                texts.append(restored.generate(max_new_tokens=12, ignore_eos=True))
        found.append(texts)
    assert found[0] == found[1]


@pytest.mark.parametrize("invariant", [False, True])
def test_replies_that_share_beginnings_are_the_same(
    invariant: bool, models: tuple[Model, Model]
) -> None:
    rolling, whole = models
    prompts = [
        [*LONG[:length], *LONG[start : start + 7]]
        for length, start in ((150, 3), (150, 9), (ROWS + 3, 20), (160, 3), (30, 40), (199, 0))
    ]
    requests = [
        Request(prompt=prompt, max_new_tokens=20, sampling=GREEDY, ignore_eos=True)
        for prompt in (*prompts, *prompts)
    ]
    with Engine(rolling, slots=3, prefill_chunk=16, batch_invariant=invariant) as engine:
        replies = [engine.submit(request) for request in requests]
        found = [[piece.token for piece in reply] for reply in replies]
    expected = [tokens(whole, prompt, 20) for prompt in prompts]
    assert found == expected * 2


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
def test_a_device_that_keeps_the_window_alone_gives_the_same(
    graph: bool, half: tuple[Path, Path], monkeypatch: Any
) -> None:
    prompts = [LONG, SHORT, [*LONG[:90], 7]]
    with edge_memllm.load(half[1], device="cpu", threads=1) as whole:
        expected = [tokens(whole, prompt, 40) for prompt in prompts]
    pretend_cuda(monkeypatch)
    with edge_memllm.load(half[0], device="cuda", threads=1, cuda_graph=graph) as model:
        assert [tokens(model, prompt, 40, speculate=3) for prompt in prompts] == expected
        with Engine(model, slots=2, prefill_chunk=16) as engine:
            replies = [
                engine.submit(
                    Request(prompt=prompt, max_new_tokens=40, sampling=GREEDY, ignore_eos=True)
                )
                for prompt in prompts
            ]
            assert [[piece.token for piece in reply] for reply in replies] == expected
        with model.session(sampling=GREEDY) as session:
            session.append(LONG)
            session.prefill()
            rows = session.nbytes - footprint(model.manifest, len(LONG)).kv_bytes
            assert rows == 2 * (WINDOW - ROWS) * position_bytes(model.manifest)


def test_continuations_of_one_context_are_scored_as_they_were(
    models: tuple[Model, Model],
) -> None:
    context, continuations = LONG[:150], [LONG[:90], LONG[90:93], LONG[30:130]]
    scores = []
    for model in models:
        with Scorer(model) as scorer:
            scores.append([each.logprob for each in scorer.score(context, continuations)])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_memory_is_planned_for_what_is_kept(models: tuple[Model, Model]) -> None:
    rolling, whole = (model.manifest for model in models)
    position = position_bytes(whole) // 3  # of three layers, all alike
    assert position_bytes(rolling) == position
    assert (window_bytes(rolling), window_bytes(whole)) == (2 * ROWS * position, 0)
    assert footprint(rolling, CONTEXT).kv_bytes == (CONTEXT + 2 * ROWS) * position
    with models[0].session() as session:
        session.append(LONG)
        session.prefill()
        mark = 2 * WINDOW * position  # from where another answer would begin
        assert session.nbytes == footprint(rolling, len(LONG)).kv_bytes + mark


def test_a_limit_counts_windows_once(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = ProcessMemory(anon_bytes=50_000_000)
    monkeypatch.setattr("edge_memllm.loading.process_memory", lambda: held)
    with edge_memllm.load(folders[0], threads=1, prefill_chunk=16) as model:
        memory = model.describe()["memory"]
    position = memory["kv_position_bytes"] + memory["score_position_bytes"]
    limit = memory["estimate_bytes"] + memory["kv_window_bytes"] + 300 * position
    with edge_memllm.load(folders[0], threads=1, prefill_chunk=16, memory_limit=limit) as model:
        assert len(tokens(model, LONG, 90)) == 90
        message = (
            r"301 positions of one sequence are needed, 300 fit: .*, windows of layers [\d,]+,"
        )
        with pytest.raises(edge_memllm.RequestError, match=message):
            tokens(model, LONG, 150)


def test_a_graph_that_keeps_all_where_the_manifest_says_a_window_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    import shutil

    def change(model: object) -> None:
        for node in model.graph.node:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                if attribute.name == "sliding_window_cache":
                    attribute.i = 0

    copied = Path(shutil.copytree(folders[0], tmp_path / "copied"))
    change_graph(copied, change)
    assert manifest_of(copied).model.caches[0].rolling
    refused(copied, r"graph\.onnx: .* has keys of .*'R'.*, expected .*'C'")


def test_another_try_computes_nothing_again(models: tuple[Model, Model]) -> None:
    session = models[0].session(sampling=GREEDY)
    session.append(LONG)
    first = session.generate(max_new_tokens=120, ignore_eos=True)
    session.rewind(len(LONG))
    assert session.computed == len(LONG) - 1
    assert session.generate(max_new_tokens=120, ignore_eos=True) == first


def test_prompts_that_begin_alike_compute_the_beginning_once(models: tuple[Model, Model]) -> None:
    rolling, whole = models
    shared = LONG[:150]
    prompts = [[*shared, *LONG[start : start + 30]] for start in (0, 40, 80, 120)]
    with Engine(rolling, slots=4, prefill_chunk=16) as engine:
        for number, prompt in enumerate(prompts):
            request = Request(prompt=prompt, max_new_tokens=100, sampling=GREEDY, ignore_eos=True)
            pieces = list(engine.submit(request))
            assert [piece.token for piece in pieces] == tokens(whole, prompt, 100)
            # The first is too far on; the second is marked where it parts from that.
            assert pieces[-1].statistics.reused_tokens == (0 if number < 2 else len(shared))
        replies = [
            engine.submit(Request(prompt=[*LONG[::-1], n], max_new_tokens=4, sampling=GREEDY))
            for n in (1, 2, 3)
        ]
        reused = [list(reply)[-1].statistics.reused_tokens for reply in replies]
        assert reused == [0, len(LONG), len(LONG)]
