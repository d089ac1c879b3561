"""The model's thread: loads, goes on with a text, stops. Knows nothing of windows.

What happens is told as events in a queue, which any toolkit can read from its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import perf_counter

from edge_memllm.errors import Cancellation, EdgeMemLLMError, GenerationCancelledError
from edge_memllm.loading import load
from edge_memllm.model import Model
from edge_memllm.sampling import Sampling
from edge_memllm.session import Session
from edge_memllm.statistics import process_memory


@dataclass(frozen=True)
class Loading:
    """A model is being loaded; `share` of the present stage is done, 0 to 1."""

    stage: str
    share: float


@dataclass(frozen=True)
class Loaded:
    """A model is ready."""

    name: str
    description: str


@dataclass(frozen=True)
class Wrote:
    """The model wrote a piece of text."""

    text: str
    figures: Figures


@dataclass(frozen=True)
class Ended:
    """Nothing is under way any more; `problem` says why, if something went wrong."""

    problem: str = ""


@dataclass(frozen=True)
class Figures:
    """What the text under way costs, so far."""

    tokens: int
    reused: int  # tokens of the text that did not have to be computed again
    tokens_per_second: float
    first_token_seconds: float
    read_bytes_per_token: float  # of the table, from flash
    memory_bytes: int | None  # of the process, without mapped files


Event = Loading | Loaded | Wrote | Ended


class Worker:
    """Does one thing at a time, in the order asked for. Every call returns at once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._cancellation = Cancellation()
        self._model: Model | None = None
        self._session: Session | None = None

    def events(self) -> Iterator[Event]:
        """Yield what happened since the last call."""
        while True:
            try:
                yield self._events.get_nowait()
            except Empty:
                return

    def load(self, path: Path) -> None:
        """Load another model in place of the present one."""
        self._begin(lambda cancellation: self._load(path, cancellation))

    def go_on(self, text: str, sampling: Sampling, tokens: int) -> None:
        """Write up to `tokens` tokens behind `text`; what it shares with the last one is kept."""
        self._begin(lambda cancellation: self._go_on(text, sampling, tokens, cancellation))

    def stop(self) -> None:
        """End what is being written, within one token, or the loading, at its next stage."""
        self._cancellation.cancel()

    def close(self) -> None:
        """Stop, and free the model; waits for that."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        if self._model is not None:
            self._model.close()

    def _begin(self, work: Callable[[Cancellation], None]) -> None:
        cancellation = self._cancellation = Cancellation()
        self._thread.submit(self._guarded, work, cancellation)

    def _guarded(self, work: Callable[[Cancellation], None], cancellation: Cancellation) -> None:
        with self._reported():
            work(cancellation)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        problem = ""
        try:
            yield
        except GenerationCancelledError:
            pass
        except EdgeMemLLMError as error:
            problem = str(error)
        finally:
            self._events.put(Ended(problem))

    def _load(self, path: Path, cancellation: Cancellation) -> None:
        def tell(stage: str, done: int, total: int) -> None:
            cancellation.check()
            self._events.put(Loading(stage, done / max(1, total)))

        if self._model is not None:
            self._model.close()
            self._model = None
        self._model = model = load(path, progress=tell)
        self._session = model.session()
        said = model.describe()
        layers, reader = f"{said['layers']} layers of {said['width']}", said["reader"]
        self._events.put(Loaded(path.name, f"{layers} · {said['codec']} table · {reader}"))

    def _go_on(
        self, text: str, sampling: Sampling, tokens: int, cancellation: Cancellation
    ) -> None:
        model, session = self._model, self._session
        if model is None or session is None:
            return
        ids = model.tokenize(text)
        kept = session.rewind(ids)
        reused, start = session.computed, perf_counter()
        session.append(ids[kept:])
        before, first = model.table.statistics.bytes_read, 0.0
        pieces = session.stream(max_new_tokens=tokens, sampling=sampling, cancellation=cancellation)
        for count, piece in enumerate(pieces, 1):
            now = perf_counter() - start
            first = first or now
            read = model.table.statistics.bytes_read - before
            fed = len(ids) - reused + count - 1
            figures = Figures(
                tokens=count,
                reused=reused,
                tokens_per_second=(count - 1) / (now - first) if now > first else 0.0,
                first_token_seconds=first,
                read_bytes_per_token=read / max(1, fed),
                memory_bytes=process_memory().anon_bytes,
            )
            self._events.put(Wrote(piece.text, figures))
