"""The engine: one thread that computes, a queue in front of it, replies out of it.

Requests come from any thread or from asyncio; they join and leave between steps. Nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from threading import Condition, Thread
from time import monotonic
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from edge_memllm.engine.feeding import SERVING_CHUNK, Feeder, StepCosts
from edge_memllm.engine.reply import Deadline, Generation, Reply
from edge_memllm.engine.request import CheckedRequest, Request, check_positive, refuse_fields
from edge_memllm.engine.scheduler import EngineStatistics, Scheduler
from edge_memllm.errors import DrainingError, QueueFullError, RequestError
from edge_memllm.process.forking import ProcessLock

if TYPE_CHECKING:
    from edge_memllm.model import Model

Item = TypeVar("Item")

_log = logging.getLogger(__name__)

_ONE_TEXT_ONLY = {
    "cancellation": ": a reply of an engine has its own `cancel`. Call that.",
}


class Engine:
    """Serves many requests with one model. Close it, or use `with`; the model stays the caller's.

    At most `slots` texts are under way, `queue` more wait, of one client at most `per_client`
    (None sets no limit of its own). `prefill_chunk` tokens of a prompt are computed between two
    tokens of the texts under way.

    A reply is the text its request would get alone, up to the rounding of the graph's arithmetic,
    which differs a little with the number of texts in a step. With `batch_invariant` it is so to
    the last bit, whatever else goes on; texts then advance one after the other, which is slower.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        queue: int = 64,
        per_client: int | None = None,
        prefill_chunk: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """Start the thread. Raises `RequestError` for what cannot be, or a closed model."""
        self._slots = check_positive("slots", slots)
        self._queue_limit = check_positive("queue", queue)
        self._client_limit = check_positive(
            "per_client", queue if per_client is None else per_client
        )
        self._chunk = min(SERVING_CHUNK, model.prefill_chunk)
        if prefill_chunk is not None:
            self._chunk = check_positive("prefill_chunk", prefill_chunk)
        self._invariant = batch_invariant
        self._model = model
        self._queue = FairQueue[Generation]()
        self._statistics = EngineStatistics(slots=self._slots)
        self._costs = StepCosts()
        self._changed = Condition(ProcessLock())  # type: ignore[arg-type]  # it is one
        self._under_way = 0
        self._scheduler: Scheduler | None = None
        self._draining = self._stopped = False
        self._open = ExitStack()
        self._open.enter_context(model.in_use())
        self._thread = Thread(target=self._run, name="edge-memllm-engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        now = self.statistics
        state = "running" if self.running else "ended"
        return (
            f"<Engine {state}: {now.under_way} of {now.slots} slots busy, {now.queued} queued, "
            f"of {self._model!r}>"
        )

    @property
    def model(self) -> Model:
        """The model that is served."""
        return self._model

    @property
    def running(self) -> bool:
        """Whether it takes requests: it was not told to end, and its thread lives."""
        return not self._draining and self._thread.is_alive()

    @property
    def statistics(self) -> EngineStatistics:
        """What goes on, and what was done so far."""
        with self._changed:
            return replace(
                self._statistics,
                under_way=self._under_way,
                queued=len(self._queue),
                kv_bytes=self._costs.kv_bytes,
                records_read=self._costs.records_read,
                bytes_read=self._costs.bytes_read,
            )

    def submit(self, request: Request) -> Reply:
        """Put a request into the queue and return its reply, at once.

        Raises `RequestError` for one that cannot be done, `QueueFullError` when too many wait,
        and `DrainingError` when the engine is ending.
        """
        model = self._model
        refuse_fields(request, _ONE_TEXT_ONLY)
        checked = model.checked(request, fewest_tokens=0)
        if request.choices > self._queue_limit:
            raise RequestError(
                f"choices is {request.choices}, expected at most {self._queue_limit}: as many as "
                "may wait."
            )
        records = model.records(request.overlays, without_memory=request.without_memory)
        deadline = _deadline_of(checked)
        reply = Reply(checked.prompt, checked.seed, request.choices, self._wake, deadline)
        choices = [
            Generation(number, checked, records, reply, model.tokenizer)
            for number in range(request.choices)
        ]
        with self._changed:
            self._require_room(request.client, len(choices))
            self._statistics.requests += 1
            self._queue.push(request.client, choices)
            self._changed.notify_all()
        return reply

    def drain(self, timeout: float, patience: float | None = None) -> bool:
        """Take no more requests, finish those there are within `timeout` seconds, and close.

        Returns whether all were finished; the others end with `DrainingError`. For the last step
        under way it waits `patience` seconds longer, as `close` does.
        """
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(self._idle, timeout)
        self.close(patience)
        return done

    def close(self, timeout: float | None = None) -> bool:
        """End every request under way with `DrainingError` and the thread; twice is fine.

        Waits for the step under way, for at most `timeout` seconds. Returns whether the thread has
        ended: if it has not, the step hangs, and the model must stay open.
        """
        with self._changed:
            self._draining = self._stopped = True
            self._fail_waiting(_ended())
            if self._scheduler is not None:  # at once: its step may not come back
                self._scheduler.fail_all(_ended())
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_room(self, client: str, count: int) -> None:
        if not self._draining and not self._thread.is_alive():
            raise DrainingError(
                "The engine's thread is not of this process, which was forked from the one that "
                "started it. Start an engine in each process."
            )
        if self._draining:
            self._statistics.refused += 1
            raise DrainingError("The engine is ending and takes no more requests.")
        free = max(0, self._slots - self._under_way)
        waiting, own = len(self._queue), self._queue.waiting(client)
        if waiting + count <= self._queue_limit + free and own + count <= self._client_limit + free:
            return
        self._statistics.refused += 1
        after = max(1.0, math.ceil(self._statistics.text_seconds * (waiting + count) / self._slots))
        raise QueueFullError(
            f"{waiting} texts wait already, {own} of this client; at most {self._queue_limit} may, "
            f"{self._client_limit} of one client. Try again in about {after:.0f} s.",
            after,
        )

    def _idle(self) -> bool:
        return self._stopped or not (self._under_way or self._queue)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while not self._stopped:
                try:
                    self._serve()
                except BaseException as error:  # a panic of a library in Rust is no Exception
                    _log.exception("there is no room to work in")
                    self._give_up_next(error)
        finally:
            with self._changed:
                self._draining = self._stopped = True
                self._under_way = 0
                self._fail_waiting(_ended())
                self._changed.notify_all()
            self._open.close()

    def _serve(self) -> None:
        """Serve with one cache until the engine ends, or something takes the cache along."""
        model = self._model
        table = model.records(()).source  # until a choice brings its own
        with Feeder(model.runtime, table, self._slots, self._chunk, self._costs) as feeder:
            context = model.manifest.model.max_position_embeddings
            scheduler = Scheduler(
                feeder, context, self._chunk, self._statistics, invariant=self._invariant
            )
            self._scheduler = scheduler
            try:
                while self._wait_for_work(scheduler):
                    scheduler.advance()
                scheduler.give_up(_ended())
            except BaseException as error:
                _log.exception("a step failed, and with it all requests under way")
                scheduler.give_up(error)

    def _give_up_next(self, error: BaseException) -> None:
        """Fail those who wait with what kept the engine from beginning, once there are some."""
        with self._changed:
            self._under_way = 0
            self._changed.wait_for(lambda: self._queue or self._stopped)
            self._statistics.given_up += self._fail_waiting(error)

    def _fail_waiting(self, error: BaseException) -> int:
        waiting = self._queue.remove(lambda _: True)
        for choice in waiting:
            choice.fail(error)
        return len(waiting)

    def _wait_for_work(self, scheduler: Scheduler) -> bool:
        """Let choices in, waiting for some if there are none; False when the engine ends."""
        with self._changed:
            while True:
                self._under_way = scheduler.under_way
                if self._stopped:
                    return False
                self._statistics.given_up += len(self._queue.remove(Generation.over))
                self._let_in(scheduler)
                if self._under_way:
                    return True
                self._changed.notify_all()  # who drains waits for this
                self._changed.wait()

    def _let_in(self, scheduler: Scheduler) -> None:
        while scheduler.free and (choice := self._queue.pop()) is not None:
            scheduler.admit(choice)
        self._under_way = scheduler.under_way


def _deadline_of(request: CheckedRequest) -> Deadline | None:
    asked = request.request
    if asked.timeout is None:
        return None
    since = monotonic() if asked.since is None else asked.since
    return Deadline(asked.timeout, since, asked.choices * request.limit)


def _ended() -> DrainingError:
    return DrainingError("The engine ended before the reply was finished. Ask another one.")


class FairQueue(Generic[Item]):
    """Who waits; clients take turns. Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def waiting(self, client: str) -> int:
        """Return how many items of one client wait."""
        return len(self._lines.get(client, ()))

    def push(self, client: str, items: Iterable[Item]) -> None:
        """Append items to a client's line; a client who comes anew has its turn last."""
        self._lines.setdefault(client, deque()).extend(items)

    def pop(self) -> Item | None:
        """Take the first item of the client whose turn it is; None when nobody waits."""
        if not self._lines:
            return None
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out, and return, every item that is unwanted."""
        removed: list[Item] = []
        for client, line in list(self._lines.items()):
            kept = deque[Item]()
            for item in line:
                (removed if unwanted(item) else kept).append(item)
            self._lines[client] = kept
            if not kept:
                del self._lines[client]
        return removed
