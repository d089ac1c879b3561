"""What endpoints share: a loaded model and the engine over it, the state of a server, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from time import monotonic, sleep

from edge_memllm.engine.engine import Engine
from edge_memllm.engine.grammar import MakeConstraint, behind_reasoning
from edge_memllm.engine.reply import ReplyPiece
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.engine.scheduler import EngineStatistics
from edge_memllm.engine.tool_use import ToolUse
from edge_memllm.errors import RequestError
from edge_memllm.server.fields import (
    ApiError,
    Body,
    BodyFields,
    blaming,
    explained,
    is_storage,
    shown,
)
from edge_memllm.server.forms import WantedForm
from edge_memllm.server.lanes import Lane
from edge_memllm.server.settings import Settings
from edge_memllm.statistics import ProcessMemory
from edge_memllm.text.chat import ChatTemplate
from edge_memllm.text.reasoning import Reasoning
from edge_memllm.text.token_texts import TokenTexts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "edge_memllm_"
# Seconds over which the speed is an average.
WINDOW = 10
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

# What a model without a limit of its own takes: its context is what ends a text then.
_MOST_TOKENS = (1 << 31) - 1
MOST_MODEL_ID = 1024
# Each of them is done in milliseconds.
_QUICK_THREADS = 4

_ENGINE: Mapping[str, tuple[str, str, str]] = {
    "slots": ("slots", "gauge", "texts that can be under way at once"),
    "under_way": ("slots_busy", "gauge", "texts under way"),
    "queued": ("queued", "gauge", "texts that wait for a slot"),
    "kv_bytes": ("kv_bytes", "gauge", "bytes of keys and values"),
    "requests": ("accepted_total", "counter", "prompts taken into the queue"),
    "refused": ("refused_total", "counter", "prompts refused because the queue was full"),
    "finished": ("finished_total", "counter", "texts that came to their end"),
    "given_up": ("given_up_total", "counter", "texts cancelled, out of time or failed"),
    "prompt_tokens": ("prompt_tokens_total", "counter", "tokens of prompts that were computed"),
    "reused_tokens": ("reused_tokens_total", "counter", "tokens of prompts that were there still"),
    "completion_tokens": ("completion_tokens_total", "counter", "tokens made"),
    "draft_tokens": ("draft_tokens_total", "counter", "tokens proposed by speculation"),
    "accepted_tokens": ("accepted_tokens_total", "counter", "of those, what was chosen"),
    "steps": ("steps_total", "counter", "steps in which texts grew"),
    "records_read": ("records_total", "counter", "records of the table that were used"),
    "bytes_read": ("table_read_bytes_total", "counter", "bytes of records read from the table"),
}

_MEMORY: Mapping[str, tuple[str, str, str]] = {
    "anon_bytes": ("resident_anon_bytes", "gauge", "memory of the process's own"),
    "file_bytes": ("resident_file_bytes", "gauge", "mapped files in memory"),
    "swap_bytes": ("swapped_bytes", "gauge", "memory of the process's own, swapped out"),
    "peak_bytes": ("resident_peak_bytes", "gauge", "the most that was ever in memory, of both"),
}

_MODELS: Mapping[str, tuple[str, str, str]] = {
    "loads": ("models_loaded_total", "counter", "how often a model was loaded"),
    "held_bytes": ("models_bytes", "gauge", "memory that models have taken, as it is planned"),
    "limit_bytes": ("models_limit_bytes", "gauge", "what the memory limit has for models"),
}


@dataclass(frozen=True, slots=True)
class ModelsAccount:
    """What goes on with the models of a server; bytes where several share a memory limit."""

    loads: int = 0
    held_bytes: int | None = None
    limit_bytes: int | None = None


class ServerState:
    """What all models of a server share: settings, metrics, and threads that read requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.quick = Lane("short requests", _QUICK_THREADS)
        self.thorough = Lane("long requests", 1)
        self.schemas = Lane("schemas", 1, settings.limits.schemas_waiting)
        self.long_bodies = asyncio.Semaphore(settings.limits.long_bodies)

    @property
    def busy(self) -> bool:
        """Whether a thread still works on a request, be it that nobody waits for it."""
        return any(lane.busy for lane in (self.quick, self.thorough, self.schemas))

    def at_rest(self, patience: float) -> bool:
        """Wait a moment for work that nobody waits for any more; False if some goes on."""
        until = monotonic() + patience
        while self.busy and monotonic() < until:
            sleep(0.01)
        return not self.busy

    def lane(self, body: Body) -> Lane:
        """Return where a body is to be read and its prompts are to be tokenized."""
        return self.quick if body.brief else self.thorough


class Service:
    """One model that is loaded, and the engine over it. Holds no request; safe to share."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        template: ChatTemplate | None = None,
        state: ServerState | None = None,
    ) -> None:
        """Take an engine; `template` replaces the chat template of its model."""
        self.state = state or ServerState(settings)
        self.engine = engine
        self.model = engine.model
        self.settings = settings
        self.template = template or self.model.tokenizer.chat_template
        self.metrics = self.state.metrics
        self.trouble: str | None = None  # why the last reply could not be read, if it was that
        self.spec = self.model.manifest.model
        self.grammars = self.model.grammars
        self.texts = TokenTexts(self.model.tokenizer, self.spec.vocab_size)
        self.token_bound = self.model.tokenizer.bound
        self.quick = self.state.quick
        self.schemas = self.state.schemas

    def close(self, patience: float) -> bool:
        """End the engine and free the model; False, and it stays, where a step hangs."""
        if not self.engine.close(patience):
            return False
        self.model.close()
        return True

    @property
    def most_tokens(self) -> int:
        """The most tokens a request may ask for."""
        limit = self.settings.limits.max_tokens
        return _MOST_TOKENS if limit is None else limit

    @cached_property
    def fingerprint(self) -> str:
        """What decides, beside seed and request, which text comes: weights, forms, device."""
        graph, table = self.model.manifest.graph, self.model.manifest.table
        parts = (self.spec.identity, graph, table.codec, self.model.runtime.name)
        return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    async def constraint(
        self,
        wanted: WantedForm | None,
        tools: ToolUse | None = None,
        reasoning: Reasoning | None = None,
    ) -> MakeConstraint | None:
        """Return what makes constraints to a form, or to calls; new ones wait for those before.

        They hold what comes behind the reasoning, where a prompt has opened that, or where all is
        free until a call begins. Raises `ApiError`.
        """
        found = await self._constraint(wanted, tools)
        free = tools is not None and not tools.from_the_start
        if found is None or reasoning is None or not (reasoning.begun or free):
            return found
        tokenizer = self.model.tokenizer
        special = map(tokenizer.special_token, reasoning.marks)
        shown = [token for token in special if token is not None]
        shown += () if tools is None else tools.shown_tokens(tokenizer)
        return behind_reasoning(found, reasoning, tokenizer, shown)

    async def _constraint(
        self, wanted: WantedForm | None, tools: ToolUse | None
    ) -> MakeConstraint | None:
        if tools is not None:
            return await self._of_tools(tools)
        if wanted is None:
            return None
        with blaming(wanted.where):
            return await self._compiled(wanted.form)

    async def _compiled(self, form: ResponseFormat) -> MakeConstraint:
        kept = self.grammars.kept(form)
        if kept is not None:
            return kept
        lane = self.quick if form.kind == "json_object" else self.schemas
        return await lane.run(self.grammars.constraints, form)

    async def _of_tools(self, tools: ToolUse) -> MakeConstraint:
        """Return what holds replies to calls, from where one has to come or has begun."""
        tokenizer = self.model.tokenizer

        async def compiled(use: ToolUse) -> MakeConstraint:
            return await self._compiled(use.form(tokenizer))

        with blaming("tools"):
            try:
                calls = await compiled(tools)
            except RequestError:
                # Who may call a tool asks for a call, and was promised its schema if it is strict.
                if tools.from_the_start:
                    raise
                calls = await compiled(tools.of_any_arguments())
        return tools.constraint(calls, tokenizer)

    def note_piece(self, piece: ReplyPiece) -> None:
        """Count a piece of a reply; one that came to its end ends a trouble."""
        self.metrics.note_piece(piece)
        if piece.finish_reason is not None:
            self.trouble = None

    def explained(self, error: Exception) -> ApiError:
        """Return what a client is told about an error; remember it if storage is at fault."""
        if is_storage(error):
            self.trouble = type(error).__name__
        return explained(error)

    @staticmethod
    def now() -> int:
        """Return the time, in seconds since 1970."""
        return int(time.time())

    def check_model(self, fields: BodyFields) -> None:
        """Take the field `model`, which names the one there is or is left out."""
        name = fields.bounded_text("model", MOST_MODEL_ID)
        if name is not None:
            self.check_model_id(name, fields.param("model"))

    def check_model_id(self, name: str, param: str) -> None:
        """Raise `ApiError` for a model that is not served."""
        served = self.settings.model_id
        if name != served and name not in self.settings.aliases:
            raise unknown_model(name, shown(served), param)


def unknown_model(name: str, there: str, param: str) -> ApiError:
    """Return the error for a model that is not served; `there` are those that are."""
    message = f"There is no model {shown(name)} here. This server has {there}."
    return ApiError(404, message, code="model_not_found", param=param)


class Metrics:
    """What the engine does not count itself."""

    def __init__(self) -> None:
        self.under_way = 0  # requests, of any kind
        self.speed = Speed()
        self._responses: Counter[tuple[str, int]] = Counter()
        self._first_token = Histogram()
        self._queued = Histogram()
        self._reply = Histogram()

    def note_response(self, path: str, status: int) -> None:
        """Count a request that was answered; `path` is one of the server's own."""
        self._responses[path, status] += 1

    def note_piece(self, piece: ReplyPiece) -> None:
        """Count a token, and what its choice took if it is the last."""
        if piece.token is not None:
            self.speed.note()
        if piece.statistics is not None:
            self._queued.note(piece.statistics.queued_seconds)
            self._reply.note(piece.statistics.seconds)
            if piece.statistics.first_token_seconds is not None:
                self._first_token.note(piece.statistics.first_token_seconds)

    def text(self, engine: EngineStatistics, memory: ProcessMemory, models: ModelsAccount) -> str:
        """Return everything as one text."""
        told = (*_samples(_ENGINE, engine), *_samples(_MODELS, models), *_samples(_MEMORY, memory))
        return "\n".join([*self._server(), *told, ""])

    def _server(self) -> Iterator[str]:
        name = PREFIX + "http_requests_total"
        yield from _head(name, "counter", "requests answered, by path and status")
        for (path, status), count in sorted(self._responses.items()):
            yield f'{name}{{path="{path}",status="{status}"}} {count}'
        yield from _sample("http_requests_under_way", "gauge", self.under_way, "requests under way")
        yield from _sample(
            "tokens_per_second", "gauge", self.speed.value(), f"tokens made, over {WINDOW} s"
        )
        for name, histogram, meaning in (
            ("queued_seconds", self._queued, "from being asked to having a slot"),
            ("first_token_seconds", self._first_token, "from being asked to the first token"),
            ("reply_seconds", self._reply, "from being asked to the end of a choice"),
        ):
            yield from _head(PREFIX + name, "histogram", meaning)
            yield from histogram.lines(PREFIX + name)


def _samples(told: Mapping[str, tuple[str, str, str]], values: object) -> Iterator[str]:
    for field, (name, kind, meaning) in told.items():
        value = getattr(values, field)
        if value is not None:  # a system that does not tell, or no limit
            yield from _sample(name, kind, value, meaning)


def _sample(name: str, kind: str, value: float, meaning: str) -> Iterator[str]:
    yield from _head(PREFIX + name, kind, meaning)
    yield f"{PREFIX}{name} {value}"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


class Histogram:
    """How often something took how long, in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def note(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples."""
        totals = list(accumulate(self._counts))
        for bound, total in zip((*map(str, _BOUNDS), "+Inf"), totals, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {totals[-1]}"


class Speed:
    """Tokens per second over the last seconds."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=WINDOW + 1)  # (second, tokens)

    def note(self) -> None:
        """Count a token."""
        now = int(monotonic())
        if not self._seconds or self._seconds[-1][0] != now:
            self._seconds.append((now, 0))
        self._seconds[-1] = (now, self._seconds[-1][1] + 1)

    def value(self) -> float:
        """Return the average over the whole seconds of the window."""
        now = int(monotonic())
        return (
            sum(count for second, count in self._seconds if now - WINDOW <= second < now) / WINDOW
        )
