"""A text that stays: appended to, continued, taken back, saved, and restored in another process.

Keys and values of what was computed are kept, so that going on costs only what is new. Knows the
model's parts, not how a saved session is laid out: that is `session_file`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.manifest import Manifest
from edge_memllm.engine.chat import (
    Chat,
    ChatPiece,
    ChatReply,
    Message,
    awhole,
    chatting,
    prepared,
    replied,
    whole,
)
from edge_memllm.engine.feeding import Feeder, StepCosts
from edge_memllm.engine.generation import (
    Piece,
    TextAssembly,
    TokenSequence,
    generate_tokens,
    in_thread,
)
from edge_memllm.engine.grammar import Grammars
from edge_memllm.engine.request import (
    CANCELLED_BY_TASK,
    CHAT_ONLY,
    ENGINE_ONLY,
    CheckedRequest,
    Prompt,
    Request,
    asked_by,
    check_request,
    common_length,
    going_on,
    prompt_tokens,
    refuse_fields,
    text_tokens,
)
from edge_memllm.errors import Cancellation, RequestError
from edge_memllm.overlays.loaded import Selection
from edge_memllm.process.forking import ProcessLock
from edge_memllm.runtime_protocol import KVCache, Runtime
from edge_memllm.session_file import Origin, SessionFile, SessionState, write_session
from edge_memllm.statistics import Meter
from edge_memllm.text.tokenization import Tokenizer

_CHOSEN = ": a session keeps what it was made with. Give it to Model.session."
_OF_THE_SESSION = dict.fromkeys(("seed", "overlays", "without_memory"), _CHOSEN)


class SessionModel(Protocol):
    """What a session asks of the model it is of; see `edge_memllm.model.Model`."""

    tokenizer: Tokenizer
    runtime: Runtime
    prefill_chunk: int

    @property
    def manifest(self) -> Manifest:
        """What the artifact says of itself."""

    @property
    def grammars(self) -> Grammars:
        """What keeps texts to a form."""

    def records(self, overlays: Sequence[str] | None = None) -> Selection:
        """Return the records a text with these overlays gets."""

    def constrained(self, request: Request) -> Request:
        """Return a request with what keeps its text to the form it asks for."""

    def in_use(self) -> AbstractContextManager[None]:
        """Keep the model open while the context lasts."""

    def adopt(self, session: Session) -> None:
        """Close a session when the model is closed."""


class Session:
    """One text under way; `Model.session` makes one, `Model.restore_session` reads one.

    The same appended texts, seed and calls give the same tokens, and a session that was saved and
    restored goes on exactly as it would have. For one user at a time: a second call while one is
    under way is refused. Close it, or use `with`; closing the model closes it as well.
    """

    def __init__(
        self,
        model: SessionModel,
        records: Selection,
        state: SessionState,
    ) -> None:
        """Begin where `state` is; the model closes the session when it is closed itself."""
        self.sampling = state.sampling
        self.seed = state.seed
        self.messages: list[Message] = list(state.messages)  # of its chat
        self._model = model
        self._records = records
        self._draws = deepcopy(state.draws)
        self._tokens = list(state.tokens)
        self._logits = state.logits  # [V] behind the last token, if that is computed
        self._feeder = Feeder(model.runtime, records.source, 1, model.prefill_chunk)
        self._free = finalize(self, self._feeder.close)
        self._turn = SessionTurn(self._feeder.cache, model.in_use)
        if state.computed:
            self._feeder.cache.load_state(0, state.computed, state.kv)
        model.adopt(self)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the whole text: what was appended, and what was generated."""
        return tuple(self._tokens)

    @property
    def text(self) -> str:
        """The whole text, without special tokens."""
        return self._model.tokenizer.decode(self._tokens)

    @property
    def computed(self) -> int:
        """How many tokens have their keys and values; the others are computed when needed."""
        return int(self._feeder.cache.lengths[0])

    @property
    def overlays(self) -> tuple[str, ...]:
        """The names of the overlays that are on, in their order; they are for good."""
        return self._records.names

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take."""
        return self._feeder.cache.nbytes

    def __repr__(self) -> str:
        state = "closed" if self._feeder.cache.closed else f"{self.nbytes:,} B"
        return (
            f"<Session: {len(self)} tokens, {self.computed} of them computed, "
            f"{len(self.messages)} messages, {state}, seed {self.seed}>"
        )

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, more: Prompt) -> None:
        """Add text, or token ids; they are computed when they are needed, or by `prefill`.

        The first text gets what the tokenizer puts around one. Raises `RequestError` for what the
        vocabulary lacks and for more than the context holds; nothing is added then.
        """
        model = self._model
        with self._turn.whole():
            special = not self._tokens
            ids = text_tokens(more, model.tokenizer, model.manifest.model, special=special)
            room = model.manifest.model.max_position_embeddings
            if len(self._tokens) + len(ids) > room:
                raise RequestError(
                    f"the session has {len(self._tokens)} tokens, {len(ids)} were to be added, and "
                    f"the model's context holds {room}. Rewind it, or add less."
                )
            if ids:
                self._tokens += ids
                self._logits = None

    def prefill(self, *, cancellation: Cancellation | None = None) -> None:
        """Compute now what was appended, so that the next token comes at once.

        Raises `GenerationCancelledError` within one chunk of a `cancellation`; what was computed
        by then stays.
        """
        with self._turn.whole():
            self._feeder.serve(StepCosts(), cancellation)
            self._begin()
            self._compute()

    @asked_by(going_on(Request))
    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Check the request now, then yield one piece of text per new token.

        Every token that was yielded is part of the session, those of a stop string and of the end
        of the text too: `rewind` takes them back. Leaving the iterator, or cancelling, keeps what
        came so far. `sampling` None takes the session's; seed and overlays are the session's own.
        The rest is as in `Model.stream`.
        """
        return self._stream(request)

    @asked_by(going_on(Request))
    def generate(self, request: Request) -> str:
        """Return the text that follows, which becomes part of the session; see `stream`."""
        return "".join(piece.text for piece in self._stream(request))

    @asked_by(going_on(Request))
    def astream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Stream as `stream` does, for `async for`; see `Model.astream`."""
        refuse_fields(request, CANCELLED_BY_TASK)
        end = Cancellation()
        return in_thread(self._stream(replace(request, cancellation=end)), end)

    @asked_by(chatting(Request))
    def chat(self, chat: Chat) -> ChatReply:
        """Answer messages behind those of this session, and keep both; see `Model.chat`.

        Keys and values of the chat so far are used again, as far as the template leaves it as it
        was. `messages` has the chat, and is saved with the session.
        """
        return whole(self._chat(chat))

    @asked_by(chatting(Request))
    def stream_chat(self, chat: Chat) -> Generator[ChatPiece, None, None]:
        """Stream as `chat` answers; what came until it is left is kept. See `Model.stream_chat`."""
        return self._chat(chat)

    @asked_by(chatting(Request))
    def achat(self, chat: Chat) -> Coroutine[Any, Any, ChatReply]:
        """Answer as `chat` does, for `await`; see `Model.achat`."""
        return awhole(self._achat(chat))

    @asked_by(chatting(Request))
    def astream_chat(self, chat: Chat) -> AsyncGenerator[ChatPiece, None]:
        """Stream as `stream_chat` does, for `async for`; see `Model.astream`."""
        return self._achat(chat)

    def _achat(self, chat: Chat) -> AsyncGenerator[ChatPiece, None]:
        refuse_fields(chat.request, CANCELLED_BY_TASK)
        end = Cancellation()
        asked = replace(chat, request=replace(chat.request, cancellation=end))
        return in_thread(self._chat(asked), end)

    def _chat(self, chat: Chat) -> Generator[ChatPiece, None, None]:
        model, asked = self._model, chat.after(self.messages)
        request, prompt, use = prepared(asked, model.tokenizer, lambda: model.grammars)
        self._check_room(prompt)
        shared = self.rewind(prompt)
        self.append(prompt[shared:])
        return self._kept(asked, replied(self._stream(replace(request, prompt=())), use))

    def _kept(
        self, chat: Chat, pieces: Generator[ChatPiece, None, None]
    ) -> Generator[ChatPiece, None, None]:
        """Yield pieces, and keep the messages and what was said, be it all of it or not."""
        said = ""
        message: dict[str, Any] | None = None
        try:
            for piece in pieces:
                said += piece.text
                message = None if piece.reply is None else piece.reply.message
                yield piece
        finally:
            pieces.close()
            self.messages = [*chat.messages, message or {"role": "assistant", "content": said}]

    def _check_room(self, prompt: Sequence[int]) -> None:
        room = self._model.manifest.model.max_position_embeddings
        if len(prompt) > room:
            raise RequestError(
                f"the chat has {len(prompt)} tokens and the model's context holds {room}. Take "
                "messages out of session.messages, or begin another session."
            )

    def rewind(self, to: int | Sequence[int]) -> int:
        """Take back the end of the text; return how many tokens are left.

        `to` is that number, or token ids: then what the text has in common with them is left, and
        appending the rest makes it them. Random numbers are not taken back, so that another try
        gives another text. Where layers keep a window only, what is left may have to be computed
        again when the session goes on, unless it is where an answer began. Raises `RequestError`
        for a number that is not from 0 to `len`.
        """
        with self._turn.whole():
            left = to if isinstance(to, int) else common_length(self._tokens, list(to))
            if isinstance(to, bool) or not 0 <= left <= len(self._tokens):
                raise RequestError(
                    f"rewind to {to!r}, expected 0 to {len(self._tokens)}, or token ids."
                )
            if left < len(self._tokens):
                del self._tokens[left:]
                self._drop_surplus()
            return left

    def fork(self) -> Session:
        """Return a second session that goes on from here by itself, with the same random numbers.

        Costs the memory of the keys and values once more, and no computing.
        """
        with self._turn.whole():
            return Session(self._model, self._records, self._state())

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Write the session into one file, whole or not at all; return its bytes.

        It holds the text and its keys and values, `computed` positions of them, so only its owner
        may read it. Raises `RequestError` for an existing file unless `overwrite` and for
        `messages` that are no JSON, `StorageError` when writing fails.
        """
        with self._turn.whole():
            origin = Origin.of(self._model.manifest, self._records)
            return write_session(Path(path), origin, self._state(), overwrite=overwrite)

    @classmethod
    def restore(cls, model: SessionModel, path: str | os.PathLike[str]) -> Self:
        """Read a saved session; see `Model.restore_session`."""
        with SessionFile(Path(path)) as file:
            file.origin.check(Origin.of(model.manifest, model.records(())), str(path))
            records = model.records(file.origin.overlays)
            file.origin.check_overlays(Origin.of(model.manifest, records), str(path))
            with closing(model.runtime.new_cache(1)) as empty:
                state = file.state(empty.state_layout, model.manifest.model)
            return cls(model, records, state)

    def close(self) -> None:
        """Free the memory, after the step under way if there is one; twice is fine."""
        with self._turn.step:
            self._free()
            self._logits = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self) -> None:
        """Give a session without any text the token that starts one."""
        if not self._tokens:
            model = self._model
            self._tokens = prompt_tokens("", model.tokenizer, model.manifest.model)

    def _checked(self, request: Request) -> CheckedRequest:
        """Check what is asked of the text as it is now."""
        model = self._model
        spec = model.manifest.model
        asked = replace(model.constrained(request), seed=self.seed)
        checked = check_request(asked, list(self._tokens), model.tokenizer, spec, self.sampling)
        if not checked.limit:
            raise RequestError(
                f"the session has {len(self._tokens)} tokens, more than the "
                f"{spec.max_position_embeddings} of the model's context. Rewind it."
            )
        return checked

    def _stream(self, request: Request) -> Generator[Piece, None, None]:
        refuse_fields(request, {**ENGINE_ONLY, **CHAT_ONLY, **_OF_THE_SESSION})
        with self._turn.whole():
            self._checked(request)
        return self._pieces(request)

    def _pieces(self, request: Request) -> Generator[Piece, None, None]:
        with self._turn.call():
            self._begin()
            checked = self._checked(request)  # the text may be another one than when it was asked
            sequence = TokenSequence.of(checked, draws=self._draws)
            text = TextAssembly(
                self._model.tokenizer, sequence, checked.stops, request.shown_tokens
            )
            meter = Meter(self._model.runtime, self._records.source, self.seed, self.overlays)
            self._feeder.serve(meter.costs, request.cancellation)
            try:
                with self._turn.working():
                    logits = self._compute()
                tokens = generate_tokens(self._feeder, sequence, logits, request.speculate)
                while sequence.finish_reason is None:
                    with self._turn.working():
                        self._tokens.append(next(tokens))
                    yield text.piece(meter)
            finally:
                with self._turn.step:
                    self._drop_surplus()

    def _compute(self) -> NDArray[np.float32]:
        """Return the logits [V] behind the last token, computing what is not yet."""
        if self._logits is None:
            self._logits = self._feeder.prefill(0, self._tokens[self.computed :]).copy()
            self._feeder.cache.mark(0)  # another try begins here
        return self._logits

    def _drop_surplus(self) -> None:
        """Forget what is computed of the last token, or of drafts behind it."""
        self._logits = None
        if not self._feeder.cache.closed:
            cache = self._feeder.cache
            kept = min(self.computed, max(0, len(self._tokens) - 1))
            cache.truncate(0, cache.rewindable(0, kept))

    def _state(self) -> SessionState:
        return SessionState(
            tokens=tuple(self._tokens),
            logits=self._logits,
            sampling=self.sampling,
            seed=self.seed,
            draws=self._draws,
            computed=self.computed,
            kv=self._feeder.cache.state(0),
            messages=tuple(self.messages),
        )


class SessionTurn:
    """Guards one session's keys and values. Thread-safe.

    `use` keeps the model open for as long as its context lasts.
    """

    def __init__(self, cache: KVCache, use: Callable[[], AbstractContextManager[None]]) -> None:
        self.step = ProcessLock()  # held while keys and values are worked on, or freed
        self._call = ProcessLock()  # held by a call, and by a stream until it ends
        self._cache = cache
        self._use = use

    @contextmanager
    def call(self) -> Iterator[None]:
        """Be the only call for a while, on an open model. Raises `RequestError`."""
        if not self._call.acquire(blocking=False):
            raise RequestError(
                "The session is in use: another call on it has not ended. Let it end, close its "
                "iterator or cancel it; `fork`, before it, makes a second session."
            )
        try:
            with self._use():
                yield
        finally:
            self._call.release()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Work on the keys and values, which are not freed meanwhile. Raises `RequestError`."""
        with self.step:
            if self._cache.closed:
                raise RequestError("The session is closed. Make another, or restore it.")
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Be a call that is one piece of work."""
        with self.call(), self.working():
            yield
