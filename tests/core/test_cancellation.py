"""Stopping from outside: within one token, or within one chunk of the prompt."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.errors import Cancellation, GenerationCancelledError
from support.checkpoints import MakeArtifact
from support.engine import GatedRuntime, wait_until
from support.small_model import open_small_model


def test_a_stream_ends_within_one_token(folder: Path) -> None:
    runtime, cancellation = GatedRuntime(), Cancellation()
    with open_small_model(folder, runtime) as model:
        stream = model.stream("ab", ignore_eos=True, cancellation=cancellation)
        next(stream)
        next(stream)
        steps = len(runtime.steps)
        cancellation.cancel()
        with pytest.raises(GenerationCancelledError, match="what it gave before is all"):
            next(stream)
        assert len(runtime.steps) == steps
        assert runtime.caches[0].closed
        assert model.generate("ab", max_new_tokens=2)


def test_a_prompt_ends_within_one_chunk(folder: Path) -> None:
    runtime, cancellation = GatedRuntime(), Cancellation()
    with open_small_model(folder, runtime) as model:
        model.prefill_chunk = 4
        runtime.gate.clear()
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                model.generate("x" * 100, cancellation=cancellation)
            except GenerationCancelledError as error:
                failures.append(error)

        thread = threading.Thread(target=generate)
        thread.start()
        wait_until(lambda: runtime.caches)
        cancellation.cancel()
        runtime.gate.set()
        thread.join(10)
        assert failures
        assert len(runtime.steps) <= 1


@pytest.mark.parametrize("speculate", [0, 4])
def test_one_cancellation_ends_many(folder: Path, speculate: int) -> None:
    cancellation = Cancellation()
    with open_small_model(folder) as model:
        streams = [
            model.stream("ab" * 9, ignore_eos=True, speculate=speculate, cancellation=cancellation)
            for _ in range(3)
        ]
        for stream in streams:
            next(stream)
        assert not cancellation.cancelled
        cancellation.cancel()
        cancellation.cancel()
        assert cancellation.cancelled
        for stream in streams:
            with pytest.raises(GenerationCancelledError):
                list(stream)
        with pytest.raises(GenerationCancelledError):
            model.generate(["a", "b"], cancellation=cancellation)


def test_a_real_graph_is_stopped_from_another_thread(make_artifact: MakeArtifact) -> None:
    cancellation = Cancellation()
    with edge_memllm.load(make_artifact(), device="cpu", threads=1) as model:
        stream = model.stream("ab", max_new_tokens=500, ignore_eos=True, cancellation=cancellation)
        next(stream)
        timer = threading.Timer(0.02, cancellation.cancel)
        timer.start()
        with pytest.raises(GenerationCancelledError):
            list(stream)
        timer.join()
