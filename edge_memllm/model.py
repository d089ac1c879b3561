"""The outermost ring: a loaded model that turns a prompt into text.

Owns everything that was opened. Usable from several threads at once: each generation has its own
keys and values, and after `close` the last one under way frees the model.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from types import TracebackType
from typing import Any, Self, Unpack, overload
from weakref import WeakSet

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ArtifactError, Cancellation, RequestError
from edge_memllm.feeding import PREFILL_CHUNKS
from edge_memllm.generation import Piece, TokenSequence, in_thread, stream_pieces
from edge_memllm.memory_plan import MemoryPlan
from edge_memllm.overlays import Overlay, open_overlay
from edge_memllm.overlays.loaded import OverlayShelf, Selection
from edge_memllm.process.forking import ProcessLock
from edge_memllm.request import (
    CancellablePromptOptions,
    Prompt,
    PromptOptions,
    check_speculate,
    check_tokens,
    ending_tokens,
    prompt_tokens,
    token_limit,
)
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import Sampler, Sampling, check_seed, draw_seed, random_draws
from edge_memllm.session import Session
from edge_memllm.session_file import SessionState
from edge_memllm.statistics import give_back
from edge_memllm.table.source import RecordSource
from edge_memllm.table.table import Table
from edge_memllm.text.tokenization import Tokenizer, check_stops, read_json

__all__ = ["Model", "Piece"]


def describe(model: Model, memory: MemoryPlan | None) -> dict[str, Any]:
    """Return what `Model.describe` does; `memory` is what was planned when it was loaded."""
    spec, graph, table = model.manifest.model, model.manifest.graph, model.table
    return {
        "identity": spec.identity,
        "beta": spec.beta,
        "layers": spec.num_hidden_layers,
        "width": spec.hidden_size,
        "vocabulary": spec.vocab_size,
        "context": spec.max_position_embeddings,
        "codec": model.manifest.table.codec,
        "record_bytes": table.layout.record_bytes,
        "graph_weights": graph.weights,
        "compute_dtype": graph.compute_dtype,
        "runtime": model.runtime.name,
        "device": model.device,
        "reader": model.reader,
        "reader_reason": table.reader_reason,
        "overlays": list(model.overlays),
        "prefill_chunk": model.prefill_chunk,
        "memory": None if memory is None else memory.as_dict(),
    }


class Lifetime:
    """Counts users; calls `release` once, after `end` and after the last user. Thread-safe."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = ProcessLock()
        self._users = 0
        self._ended = False
        self._process = os.getpid()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Be a user for a while. Raises `RequestError` after `end`."""
        with self._lock:
            self._leave_parent()
            if self._ended:
                raise RequestError("The model is closed. Load it again.")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._ended and self._users <= 0
            if last:
                self._release()

    def end(self) -> None:
        """Take no further users; ending twice is fine."""
        with self._lock:
            self._leave_parent()
            last = not self._ended and self._users == 0
            self._ended = True
        if last:
            self._release()

    def _leave_parent(self) -> None:
        """In a forked child: forget those who use it in threads of the parent."""
        if self._process != os.getpid():
            self._process, self._users = os.getpid(), 0


def artifact_sampling(artifact: Artifact) -> Sampling:
    """Return what `generation_config.json` states, or greedy; raises `ArtifactError`."""
    try:
        return Sampling.from_generation_config(read_json(artifact, "generation_config.json"))
    except RequestError as error:
        where = artifact.path / "generation_config.json"
        raise ArtifactError(f"{where}: {error} Correct it and export again.") from error


class Model:
    """A model ready to generate; `edge_memllm.load` makes one. Close it, or use `with`."""

    def __init__(
        self,
        artifact: Artifact,
        table: Table,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        prefill_chunk: int | None = None,
        memory: MemoryPlan | None = None,
    ) -> None:
        """Take over what is open: `close` closes it.

        `prefill_chunk` is in tokens, None chooses by device; `memory` is what was planned, for
        `describe`. Raises `ArtifactError` for a wrong `generation_config.json`.
        """
        self.manifest = artifact.manifest
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.sampling = artifact_sampling(artifact)
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNKS[runtime.device]
        self._table = table
        self._shelf = OverlayShelf(table, artifact.manifest)
        self._memory = memory
        self._artifact = artifact
        self._sessions: WeakSet[Session] = WeakSet()
        self._lifetime = Lifetime(self._release)

    @property
    def device(self) -> str:
        """Where the graph runs: "cpu" or "cuda"."""
        return self.runtime.device

    @property
    def reader(self) -> str:
        """How the table is read: the name of a reader, never "auto"."""
        return self._table.reader_name

    @property
    def table(self) -> RecordSource:
        """The records that generations get: the table's, under the overlays that are loaded."""
        return self._shelf.select(None).source

    def records(self, overlays: Sequence[str] | None = None) -> Selection:
        """Return the records a generation with these overlays gets; None means all there are.

        Raises `RequestError` for a name that is not loaded.
        """
        return self._shelf.select(overlays)

    @property
    def overlays(self) -> tuple[str, ...]:
        """The names of the loaded overlays, in the order in which they act."""
        return self._shelf.names

    def add_overlay(self, overlay: str | os.PathLike[str] | Overlay) -> str:
        """Load an overlay from a file, or take one; return its name. It acts after the others.

        It is on from now on, for generations that do not choose. Raises `RequestError` for one
        that is for another model or whose name is taken, `ArtifactError` for a file that cannot
        be used.
        """
        found = overlay if isinstance(overlay, Overlay) else open_overlay(overlay)
        return self._shelf.add(found)

    def remove_overlay(self, name: str) -> None:
        """Let go of an overlay; generations under way keep it. Raises `RequestError`."""
        self._shelf.remove(name)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        speculate: int = 0,
        overlays: Sequence[str] | None = None,
        cancellation: Cancellation | None = None,
    ) -> Generator[Piece, None, None]:
        """Check the request now, then yield one piece of text per new token.

        `prompt` is text or token ids. The text ends before one of the strings `stop` and at one
        of the tokens `stop_token_ids`; a string that is one special token is taken for that.
        `sampling` None takes the artifact's own; the same `seed` gives the same text, None draws
        one and the statistics tell it. `ignore_eos` goes on
        after the end of the text, as measurements want. `speculate` is the most draft tokens of
        one step, copied from earlier in the text and kept as far as the model would have chosen
        them; 0 is off. `overlays` names those to use, in their order; None takes all that are
        loaded, () none. Closing the iterator, or leaving it, frees all it holds; the model stays
        usable. `cancellation` ends it from another thread.

        Raises `RequestError` for what cannot be done, before any work, and
        `GenerationCancelledError` within one token of a cancellation.
        """
        stops, seed, drafts = check_stops(stop), _seed(seed), check_speculate(speculate)
        ends = self._ends(stops, stop_token_ids, ignore_eos)
        sequence = self._sequence(prompt, max_new_tokens, sampling, seed, 0, ends)
        return self._one(self._pieces([sequence], stops, seed, drafts, overlays, cancellation))

    @overload
    def generate(
        self,
        prompt: Prompt,
        **options: Unpack[CancellablePromptOptions],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        **options: Unpack[CancellablePromptOptions],
    ) -> list[str]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        speculate: int = 0,
        overlays: Sequence[str] | None = None,
        cancellation: Cancellation | None = None,
    ) -> str | list[str]:
        """Return the text that follows a prompt; for a list of prompts, the list of texts.

        Several prompts advance together; each text is the one its prompt would have alone, up to
        the rounding of the graph's arithmetic. When sampling, each further prompt draws numbers
        of its own, so equal prompts get different texts. The rest is as in `stream`; only
        `speculate` is for one prompt, not for a list.
        """
        batch = _is_batch(prompt)
        prompts: Sequence[Any] = prompt if batch else [prompt]
        stops, seed, drafts = check_stops(stop), _seed(seed), check_speculate(speculate)
        if batch and drafts:
            raise RequestError(
                f"speculate is {drafts} and a list of prompts was given: drafts are for one prompt "
                "at a time. Give one prompt, or speculate 0."
            )
        ends = self._ends(stops, stop_token_ids, ignore_eos)
        sequences = [
            self._sequence(one, max_new_tokens, sampling, seed, number, ends)
            for number, one in enumerate(prompts)
        ]
        texts = [""] * len(sequences)
        for number, piece in self._pieces(sequences, stops, seed, drafts, overlays, cancellation):
            texts[number] += piece.text
        return texts if batch else texts[0]

    def astream(
        self, prompt: Prompt, **options: Unpack[PromptOptions]
    ) -> AsyncGenerator[Piece, None]:
        """Check the request now, then yield as `stream` does, for `async for`.

        A thread computes each piece when it is asked for; the event loop is never held up.
        Cancelling the task ends the computing within one token. Leave it early through
        `contextlib.aclosing`, which waits for that.
        """
        end = Cancellation()
        return in_thread(self.stream(prompt, **options, cancellation=end), end)

    def session(
        self,
        *,
        sampling: Sampling | None = None,
        seed: int | None = None,
        overlays: Sequence[str] | None = None,
    ) -> Session:
        """Return an empty session: a text that stays, is gone on with, taken back and saved.

        `sampling`, `seed` and `overlays` are as in `stream`. Raises `RequestError`.
        """
        with self.in_use():
            chosen, seed = self.sampling if sampling is None else sampling, _seed(seed)
            return Session(
                self, self.records(overlays), SessionState(chosen, seed, random_draws(seed))
            )

    def restore_session(self, path: str | os.PathLike[str]) -> Session:
        """Return the session that `Session.save` wrote, here or in another process.

        Raises `RequestError` for one of another model, export or overlay, `ArtifactError` for
        what is no session, `CorruptionError` for one that is damaged.
        """
        with self.in_use():
            return Session.restore(self, path)

    def adopt(self, session: Session) -> None:
        """Close a session when this model is closed."""
        self._sessions.add(session)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return self.tokenizer.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self.tokenizer.decode(check_tokens(ids, self.manifest.model.vocab_size))

    def describe(self) -> dict[str, Any]:
        """Return what is loaded and what was chosen, as a dict for JSON."""
        return describe(self, self._memory)

    def in_use(self) -> AbstractContextManager[None]:
        """Keep what is open open while the context lasts, even if `close` is called meanwhile.

        Raises `RequestError` when the model is closed already.
        """
        return self._lifetime.use()

    def close(self) -> None:
        """Take no further generation; free everything once those under way have ended."""
        self._lifetime.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _sequence(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: Sampling | None,
        seed: int,
        stream: int,
        ends: frozenset[int],
    ) -> TokenSequence:
        model = self.manifest.model
        tokens = prompt_tokens(prompt, self.tokenizer, model)
        limit = token_limit(max_new_tokens, len(tokens), model.max_position_embeddings)
        sampler = Sampler(self.sampling if sampling is None else sampling, seed, stream)
        return TokenSequence(tokens, sampler, limit, ends)

    def _ends(
        self, stops: Sequence[str], stop_token_ids: Sequence[int], ignore_eos: bool
    ) -> frozenset[int]:
        model = self.manifest.model
        return ending_tokens(stops, stop_token_ids, self.tokenizer, model, ignore_eos=ignore_eos)

    def _pieces(
        self,
        sequences: Sequence[TokenSequence],
        stops: Sequence[str],
        seed: int,
        drafts: int,
        overlays: Sequence[str] | None,
        cancellation: Cancellation | None,
    ) -> Generator[tuple[int, Piece], None, None]:
        records = self._shelf.select(overlays)
        return self._run(
            stream_pieces(
                self.runtime,
                records.source,
                self.tokenizer,
                sequences,
                stops=stops,
                seed=seed,
                prefill_chunk=self.prefill_chunk,
                speculate=drafts,
                overlays=records.names,
                cancellation=cancellation,
            )
        )

    def _run(
        self, stream: Generator[tuple[int, Piece], None, None]
    ) -> Generator[tuple[int, Piece], None, None]:
        with self._lifetime.use(), closing(stream):
            yield from stream

    @staticmethod
    def _one(pieces: Generator[tuple[int, Piece], None, None]) -> Generator[Piece, None, None]:
        with closing(pieces):
            for _, piece in pieces:
                yield piece

    def _release(self) -> None:
        for session in list(self._sessions):
            session.close()
        self.runtime.close()
        self._table.close()
        self._artifact.close()
        give_back()


def _is_batch(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _seed(seed: int | None) -> int:
    return draw_seed() if seed is None else check_seed(seed)
