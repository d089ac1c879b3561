"""The outermost ring: a loaded model that turns a prompt into text.

Owns everything that was opened. Usable from several threads at once: each generation has its own
keys and values, and after `close` the last one under way frees the model.
"""

from __future__ import annotations

import os
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, Self, overload
from weakref import WeakSet

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.chat import (
    Chat,
    ChatPiece,
    ChatReply,
    awhole,
    chatting,
    prepared,
    replied,
    whole,
)
from edge_memllm.engine.feeding import PREFILL_CHUNKS, Feeder, StepCosts
from edge_memllm.engine.generation import Piece, TextAssembly, TokenSequence, in_thread, stream_text
from edge_memllm.engine.grammar import Grammars
from edge_memllm.engine.request import (
    CANCELLED_BY_TASK,
    CHAT_ONLY,
    ENGINE_ONLY,
    CheckedRequest,
    Request,
    asked_by,
    check_request,
    check_tokens,
    for_each,
    prompt_tokens,
    refuse_fields,
)
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.engine.scheduler import complete_texts
from edge_memllm.errors import ArtifactError, Cancellation, RequestError
from edge_memllm.memory_plan import MemoryPlan
from edge_memllm.overlays import Overlay, open_overlay
from edge_memllm.overlays.loaded import OverlaySet, Selection
from edge_memllm.process.forking import ProcessLock
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.sampling import Sampling, check_seed, draw_seed, random_draws
from edge_memllm.session import Session
from edge_memllm.session_file import SessionState
from edge_memllm.statistics import Meter, give_back
from edge_memllm.table.source import RecordSource
from edge_memllm.table.table import Table
from edge_memllm.text.tokenization import Tokenizer, read_json

__all__ = ["Model", "Piece"]

# A list of prompts is a prompt to `generate` alone, whose two forms say so.
_ASK: Callable[..., Request] = Request
_ONE_PROMPT_ONLY = {
    "speculate": " and a list of prompts was given: drafts are for one prompt at a time. Give one "
    "prompt, or speculate 0."
}

_TEXT_ALONE = {"top": ": generate returns the text alone. Use stream or chat for scores."}


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
        self._overlays = OverlaySet(table, artifact.manifest)
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
    def table(self) -> Table:
        """The table as it lies on storage, without overlays: what was read of it, and how."""
        return self._table

    @property
    def source(self) -> RecordSource:
        """The records that generations get: the table's, under the overlays that are loaded."""
        return self._overlays.select(None).source

    def records(
        self, overlays: Sequence[str] | None = None, *, without_memory: bool = False
    ) -> Selection:
        """Return the records a generation with these overlays gets; None means all there are.

        Raises `RequestError` for a name that is not loaded.
        """
        if not without_memory:
            return self._overlays.select(overlays)
        silent = (0.0,) * self.manifest.model.num_hidden_layers
        return self._overlays.select(())._replace(memory_gain=silent)

    @cached_property
    def grammars(self) -> Grammars:
        """What keeps texts to a form; compiled ones are kept."""
        return Grammars(self.tokenizer, self.manifest.model)

    @property
    def overlays(self) -> tuple[str, ...]:
        """The names of the loaded overlays, in the order in which they act."""
        return self._overlays.names

    def add_overlay(self, overlay: str | os.PathLike[str] | Overlay) -> str:
        """Load an overlay from a file, or take one; return its name. It acts after the others.

        It is on from now on, for generations that do not choose. Raises `RequestError` for one
        that is for another model or whose name is taken, `ArtifactError` for a file that cannot
        be used.
        """
        found = overlay if isinstance(overlay, Overlay) else open_overlay(overlay)
        return self._overlays.add(found)

    def remove_overlay(self, name: str) -> None:
        """Let go of an overlay; generations under way keep it. Raises `RequestError`."""
        self._overlays.remove(name)

    @asked_by(Request)
    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Check the request now, then yield one piece of text per new token.

        Closing the iterator, or leaving it, frees all it holds; the model stays usable. What many
        texts at once have (`choices` and all behind it) is for an `edge_memllm.engine.Engine`.

        Raises `RequestError` for what cannot be done, before any work, and
        `GenerationCancelledError` within one token of a cancellation.
        """
        return self.pieces(request)

    @overload
    @asked_by(Request)
    def generate(self, request: Request) -> str: ...
    @overload
    @asked_by(for_each(Request))
    def generate(self, request: Request) -> list[str]: ...

    @asked_by(_ASK)
    def generate(self, request: Request) -> str | list[str]:
        """Return the text that follows a prompt; for a list of prompts, the list of texts.

        Several prompts advance together; each text is the one its prompt would have alone, up to
        the rounding of the graph's arithmetic. When sampling, each further prompt draws numbers
        of its own, so equal prompts get different texts. The rest is as in `stream`; only
        `speculate` is for one prompt, not for a list.
        """
        refuse_fields(request, _TEXT_ALONE)
        if _is_batch(request.prompt):
            return self._texts(request)
        return "".join(piece.text for piece in self.pieces(request))

    @asked_by(Request)
    def astream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Check the request now, then yield as `stream` does, for `async for`.

        A thread computes each piece when it is asked for; the event loop is never held up.
        Cancelling the task ends the computing within one token. Leave it early through
        `contextlib.aclosing`, which waits for that.
        """
        refuse_fields(request, CANCELLED_BY_TASK)
        end = Cancellation()
        return in_thread(self.pieces(replace(request, cancellation=end)), end)

    @asked_by(chatting(Request))
    def chat(self, chat: Chat) -> ChatReply:
        """Answer messages, by the model's chat template; return the whole reply.

        `messages` is a text, or OpenAI's objects, those of tools among them; `tools` are functions
        with type hints and a docstring, OpenAI's objects or `Tool`s, and `tool_choice` is "auto",
        "none", "required" or the name of one. Nothing calls a function but the caller. Holding
        calls to their schemas needs the extra serve. The rest is as in `stream`.
        """
        return whole(self._chat_pieces(chat))

    @asked_by(chatting(Request))
    def achat(self, chat: Chat) -> Coroutine[Any, Any, ChatReply]:
        """Check a chat now, then answer as `chat` does, for `await`; see `astream`."""
        return awhole(self._achat_pieces(chat))

    @asked_by(chatting(Request))
    def stream_chat(self, chat: Chat) -> Generator[ChatPiece, None, None]:
        """Check a chat now, then yield what is said token by token; the last piece has the reply.

        The rest is as in `chat` and `stream`.
        """
        return self._chat_pieces(chat)

    @asked_by(chatting(Request))
    def astream_chat(self, chat: Chat) -> AsyncGenerator[ChatPiece, None]:
        """Stream as `stream_chat` does, for `async for`; see `astream`."""
        return self._achat_pieces(chat)

    def _achat_pieces(self, chat: Chat) -> AsyncGenerator[ChatPiece, None]:
        refuse_fields(chat.request, CANCELLED_BY_TASK)
        end = Cancellation()
        asked = replace(chat, request=replace(chat.request, cancellation=end))
        return in_thread(self._chat_pieces(asked), end)

    def _chat_pieces(self, chat: Chat) -> Generator[ChatPiece, None, None]:
        request, _, use = prepared(chat, self.tokenizer, lambda: self.grammars)
        return replied(self.pieces(request), use)

    def pieces(self, request: Request) -> Generator[Piece, None, None]:
        """Do what `stream` does, for a request that is made already."""
        refuse_fields(request, ENGINE_ONLY)
        checked = self.checked(request)
        records = self.records(request.overlays, without_memory=request.without_memory)
        meter = Meter(self.runtime, records.source, checked.seed, records.names)
        text = TextAssembly(
            self.tokenizer, TokenSequence.of(checked), checked.stops, request.shown_tokens
        )
        opened = self._feeder(records, 1, request.cancellation, meter.costs)
        return stream_text(opened, text, request.speculate, meter)

    def checked(self, request: Request, *, fewest_tokens: int = 1) -> CheckedRequest:
        """Return a request of this model's, with its prompt as ids; raises `RequestError`.

        A new form of replies is compiled here, which may take seconds.
        """
        refuse_fields(request, CHAT_ONLY)
        request, spec = self.constrained(request), self.manifest.model
        prompt = prompt_tokens(request.prompt, self.tokenizer, spec)
        return check_request(request, prompt, self.tokenizer, spec, self.sampling, fewest_tokens)

    def constrained(self, request: Request) -> Request:
        """Return a request with what keeps its text to `response_format`, if it has one."""
        if request.response_format is None:
            return request
        form = ResponseFormat.of(request.response_format)
        if form is None:
            return replace(request, response_format=None)
        if request.constraint is not None:
            raise RequestError(
                "response_format and constraint are both given: each says which tokens may come. "
                "Leave one of the two out."
            )
        return replace(request, constraint=self.grammars.constraints(form), response_format=None)

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
            chosen = self.sampling if sampling is None else sampling
            seed = draw_seed() if seed is None else check_seed(seed)
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

    def __repr__(self) -> str:
        spec = self.manifest.model
        form = f"{self.manifest.graph.weights} graph"
        if spec.memory.layers:
            form += f", {self.manifest.table.codec} table"
        return (
            f"<Model {spec.architecture}: {spec.num_hidden_layers} layers of {spec.hidden_size}, "
            f"{form}, context {spec.max_position_embeddings}, on {self.device}, "
            f"reader {self.reader}>"
        )

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

    def _texts(self, request: Request) -> list[str]:
        """Return the text of each prompt of a list, all computed together."""
        refuse_fields(request, {**ENGINE_ONLY, **_ONE_PROMPT_ONLY})
        seed = draw_seed() if request.seed is None else request.seed
        prompts: Sequence[Any] = request.prompt
        requests = [self.checked(replace(request, prompt=prompt, seed=seed)) for prompt in prompts]
        records = self.records(request.overlays, without_memory=request.without_memory)
        with self._feeder(records, len(requests), request.cancellation) as feeder:
            context = self.manifest.model.max_position_embeddings
            return complete_texts(feeder, context, requests, records, self.tokenizer)

    @contextmanager
    def _feeder(
        self,
        records: Selection,
        batch: int,
        cancellation: Cancellation | None,
        costs: StepCosts | None = None,
    ) -> Iterator[Feeder]:
        """Give a feeder, on a model that stays open meanwhile."""
        chunk = self.prefill_chunk
        with (
            self.in_use(),
            Feeder(
                self.runtime,
                records.source,
                batch,
                chunk,
                costs,
                cancellation,
                records.memory_gain,
            ) as feeder,
        ):
            yield feeder

    def _release(self) -> None:
        for session in list(self._sessions):
            session.close()
        self.runtime.close()
        self._table.close()
        self._artifact.close()
        give_back()


def _is_batch(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def describe(model: Model, memory: MemoryPlan | None) -> dict[str, Any]:
    """Return what `Model.describe` does; `memory` is what was planned when it was loaded."""
    spec, graph, table = model.manifest.model, model.manifest.graph, model.table
    return {
        **spec.details,
        "identity": spec.identity,
        "architecture": spec.architecture,
        "memory_layers": spec.memory.layers,
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


def artifact_sampling(artifact: Artifact) -> Sampling:
    """Return what `generation_config.json` states, or greedy; raises `ArtifactError`."""
    try:
        return Sampling.from_generation_config(read_json(artifact, "generation_config.json"))
    except RequestError as error:
        where = artifact.path / "generation_config.json"
        raise ArtifactError(f"{where}: {error} Correct it and export again.") from error


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
