"""A runtime that can be held, and what tests of the engine share."""

from __future__ import annotations

import threading
import time
from typing import Any

from edge_memllm import Model, Sampling
from edge_memllm.engine import Engine, Reply, Request
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY
from support.small_model import CONTEXT

WARM = Sampling(temperature=0.9, repetition_penalty=1.2)


class GatedRuntime(FakeRuntime):
    """Can be held before its next step, counts steps, and fails when told to.

    With `pause_at` it holds itself before the step of that number, until the gate is opened. With
    few `answers` its texts repeat themselves; which one it gives still depends on all before.
    """

    pause_at: int | None = None

    def __init__(
        self,
        *,
        copies: bool = True,
        window: int | None = None,
        rows: int = 0,
        answers: int | None = None,
    ) -> None:
        super().__init__(VOCABULARY, CONTEXT, window=window, rows=rows)
        self.answers = answers
        self.gate = threading.Event()
        self.gate.set()
        self.copies = copies
        self.caches: list[Any] = []
        self.steps: list[int] = []  # texts of each step
        self.sizes: list[int] = []  # tokens of each step
        self.failure: BaseException | None = None

    def new_cache(self, batch: int) -> Any:
        self.caches.append(super().new_cache(batch))
        self.caches[-1].copies = self.copies
        return self.caches[-1]

    def step(self, buffer: Any, distinct: int, index: Any, cache: Any, wanted: Any, **more: Any):
        if len(self.steps) == self.pause_at:
            self.gate.clear()
            self.pause_at = None
        self.gate.wait(10)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.steps.append(len(index))
        self.sizes.append(index.size)
        return super().step(buffer, distinct, index, cache, wanted, **more)

    def logits(self, state: int) -> Any:
        return super().logits(state if self.answers is None else state % self.answers)


def text_of(reply: Reply, choice: int = 0) -> str:
    return "".join(piece.text for piece in reply if piece.choice == choice)


def tokens_of(reply: Reply) -> list[int | None]:
    return [piece.token for piece in reply]


def wait_until(holds: Any) -> None:
    limit = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.001)


def held(engine: Engine, runtime: GatedRuntime, request: Request) -> Reply:
    """Submit a request whose first step waits at the gate."""
    runtime.gate.clear()
    reply = engine.submit(request)
    wait_until(lambda: engine.statistics.under_way)
    return reply


def serial(model: Model, request: Request) -> list[int]:
    return [
        piece.token
        for piece in model.stream(
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            stop=request.stop,
            sampling=request.sampling,
            seed=request.seed,
            ignore_eos=request.ignore_eos,
            overlays=request.overlays,
        )
    ]
