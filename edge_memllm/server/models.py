"""The models of a server: loaded when they are asked for, freed when nobody asks or for another.

Who asks for a model waits until it is there. One thread loads and frees; where a memory limit has
no room for the next model, the one that is longest unused goes. If all are in use, the one longest
not asked for takes no new requests until its replies have ended. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from threading import Condition, Thread
from time import monotonic
from typing import Any, Literal

from edge_memllm.artifact.manifest import Manifest
from edge_memllm.engine.engine import Engine
from edge_memllm.engine.reply import as_exception
from edge_memllm.engine.scheduler import EngineStatistics
from edge_memllm.errors import DrainingError, RequestError
from edge_memllm.process.memory_account import MemoryAccount, MemoryShare
from edge_memllm.server.fields import ApiError, BodyFields, is_storage, shown
from edge_memllm.server.service import ModelsAccount, ServerState, Service, unknown_model
from edge_memllm.statistics import give_back
from edge_memllm.text import TEMPLATE_FILE
from edge_memllm.text.tools.prompt import template_format

State = Literal["unloaded", "loading", "loaded", "unloading", "stuck"]
OpenModel = Callable[[MemoryShare | None], Service]
Facts = Mapping[str, Any]

# Seconds that the last step of a model may take when it is freed.
_PATIENCE = 30.0

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """One model by its name: how to open it, and how things stand with it."""

    name: str
    open: OpenModel | None = None  # None: it is there from the beginning and stays
    facts: Facts = field(default_factory=dict)  # what is known of it, loaded or not
    aliases: tuple[str, ...] = ()
    share: MemoryShare | None = None  # of a limit that all models have in common
    refusal: str | None = None  # why it can never be loaded
    service: Service | None = None
    state: State = "unloaded"
    users: int = 0  # requests that have it
    held: bool = False  # takes no new ones, for it is to go
    last_used: float = 0.0
    keep_seconds: float | None = None  # it stays so long behind its last request; None: as all do
    trouble: str | None = None  # why it could not be loaded the last time
    waiting: list[Future[Service]] = field(default_factory=list)

    @classmethod
    def of(cls, service: Service) -> ServedModel:
        """Return a model that is loaded already, whose service is its caller's to close."""
        found = cls(service.settings.model_id, aliases=service.settings.aliases)
        found.take(service)
        return found

    def take(self, service: Service) -> None:
        """Be loaded."""
        self.service, self.state, self.trouble = service, "loaded", None
        self.facts = service_facts(service)
        self.last_used = monotonic()

    @property
    def known(self) -> Facts:
        """What is told of it: overlays, for one, may come and go while it is loaded."""
        return self.facts if self.service is None else service_facts(self.service)

    @property
    def idle(self) -> bool:
        """Whether it could be freed: it is loaded, nobody uses it, and it can be opened again."""
        return self.state == "loaded" and not self.users and self.open is not None

    def grant(self) -> None:
        """Let everybody who waits have it."""
        assert self.service is not None
        for future in self.waiting:
            if future.set_running_or_notify_cancel():
                self.users += 1
                future.set_result(self.service)
        self.waiting.clear()

    def refuse(self, error: Exception) -> None:
        """Tell everybody who waits that it does not come."""
        for future in self.waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self.waiting.clear()


class ServedModels:
    """All models of a server. Thread-safe; close it at the end.

    `idle_seconds` after its last request a model is freed; None keeps it. `account` is the memory
    that all have in common, where there is a limit.
    """

    def __init__(
        self,
        state: ServerState,
        models: Sequence[ServedModel],
        *,
        account: MemoryAccount | None = None,
        idle_seconds: float | None = None,
    ) -> None:
        self.state = state
        self.all = tuple(models)
        self._names = {name: each for each in models for name in (each.name, *each.aliases)}
        self._idle_seconds = idle_seconds
        self._changed = Condition()
        self._wanted: list[ServedModel] = []  # in the order in which they were asked for
        self._past = EngineStatistics()
        self._leaving: list[Engine] = []  # of models that are freed at the moment
        self._loads = 0
        self._account = account
        self._ended = False
        self._thread: Thread | None = None
        if account is not None:
            account.make_room = self._free_one

    @classmethod
    def of(cls, service: Service) -> ServedModels:
        """Return the models of a server that has one, loaded already."""
        return cls(service.state, [ServedModel.of(service)])

    @property
    def running(self) -> bool:
        """Whether requests are taken: no engine was told to end, and none has failed."""
        services = self._services()
        return not self._ended and all(each.engine.running for each in services)

    @property
    def trouble(self) -> str | None:
        """Why the last reply could not be read, or a model not be loaded, if it was that."""
        found = [each.trouble for each in self.all]
        found += [each.trouble for each in self._services()]
        return next(filter(None, found), None)

    @property
    def statistics(self) -> EngineStatistics:
        """What goes on in all engines, and sums since the server began."""
        with self._changed:
            engines = [*(each.engine for each in self._services()), *self._leaving]
            return _sum([self._past, *(each.statistics for each in engines)])

    @property
    def account(self) -> ModelsAccount:
        """How often models were loaded, and what they have of a memory limit."""
        account = self._account
        if account is None:
            return ModelsAccount(self._loads)
        return ModelsAccount(self._loads, account.held, account.limit)

    def find(self, name: str | None, param: str = "model") -> ServedModel:
        """Return a model by its name, or the only one. Raises `ApiError`."""
        if name is None and len(self.all) == 1:
            return self.all[0]
        there = ", ".join(each.name for each in self.all)
        if name is None:
            message = f"{param} is missing, and this server has several models: {there}. Name one."
            raise ApiError(400, message, code="missing_required_parameter", param=param)
        if name not in self._names:
            quoted = ", ".join(shown(each.name) for each in self.all)
            raise unknown_model(name, quoted, param)
        return self._names[name]

    def keep(self, model: ServedModel, seconds: float | None, param: str = "keep_alive") -> None:
        """Let a model stay so long behind the request that says so, or as all do.

        The last request to say anything, or nothing, counts. Raises `ApiError` where models are
        never freed.
        """
        frees = len(self.all) > 1 or self._idle_seconds is not None
        if seconds not in (None, math.inf) and not (frees and model.open is not None):
            message = (
                f"{param} is {seconds:g} s, and this server keeps its model: it is started "
                "without --idle-unload. Leave it out, or give -1."
            )
            raise ApiError(400, message, code="unsupported_parameter", param=param)
        model.keep_seconds = seconds

    def asked(self, fields: BodyFields) -> ServedModel:
        """Return the model that a request names. Raises `ApiError`."""
        name = fields.peek("model")
        if name is not None and not isinstance(name, str):
            return self.all[0]  # who reads the request refuses it
        return self.find(name, fields.param("model"))

    async def kept(self, model: ServedModel, stack: AsyncExitStack) -> Service:
        """Return a model once it is there; it stays loaded until `stack` is left.

        Raises `ApiError` for one that never fits, and what went wrong with loading.
        """
        service = await self._taken(model)
        stack.callback(self._put_back, model)
        return service

    def load(self, model: ServedModel) -> None:
        """Load a model now, in this thread. Raises what went wrong."""
        with self._changed:
            if model.share is not None and not model.share.open():
                raise RequestError(str(_never_fits(model)))
            self._open(model)
            self._wake()

    def drain(self, timeout: float, patience: float | None = None) -> bool:
        """Take no more requests and let all engines end, as `Engine.drain`."""
        services = self._end()
        if not services:
            return True
        with ThreadPoolExecutor(len(services)) as threads:
            done = threads.map(lambda each: each.engine.drain(timeout, patience), services)
            return all(list(done))

    def close(self, patience: float) -> bool:
        """End everything. False where a thread does not come back: then models are left open."""
        self._end()
        if self._thread is not None:
            self._thread.join(patience)
        closed = self._thread is None or not self._thread.is_alive()
        for model in self.all:
            if model.service is not None:
                closed = model.service.engine.close(patience) and closed
            closed = closed and model.state != "stuck"
        if closed and self.state.at_rest(patience):
            for model in self.all:
                if model.service is not None and model.open is not None:
                    model.service.model.close()
            return True
        return False

    async def _taken(self, model: ServedModel) -> Service:
        future = self._ask(model)
        try:
            return future.result() if future.done() else await asyncio.wrap_future(future)
        except BaseException:
            future.cancel()
            if not future.cancelled() and future.exception() is None:  # given when nobody waited
                self._put_back(model)
            raise

    def _ask(self, model: ServedModel) -> Future[Service]:
        future: Future[Service] = Future()
        with self._changed:
            if self._ended:
                raise _ending()
            if model.refusal is not None:
                raise _never_fits(model)
            if model.state == "stuck":
                raise ApiError(503, f"The model '{model.name}' does not come back.", code="stuck")
            model.waiting.append(future)
            if model.state == "loaded" and not model.held:
                model.grant()
            elif model not in self._wanted:
                self._wanted.append(model)
                self._wake()
        return future

    def _put_back(self, model: ServedModel) -> None:
        with self._changed:
            model.users -= 1
            model.last_used = monotonic()
            self._wake()

    def _services(self) -> list[Service]:
        return [service for each in self.all if (service := each.service) is not None]

    def _end(self) -> list[Service]:
        with self._changed:
            self._ended = True
            for model in self.all:
                model.refuse(_ending())
            self._changed.notify_all()
            return self._services()

    def _wake(self) -> None:
        """Let the thread look again; it is started when there may be something for it."""
        if self._thread is None and (self._wanted or self._next_look() is not None):
            self._thread = Thread(target=self._work, name="edge-memllm-models", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        with self._changed:
            while not self._ended:
                if self._wanted:
                    self._bring(self._wanted[0])
                    del self._wanted[0]
                elif (model := self._expired()) is not None:
                    _log.info("%s: freed, it was idle", model.name)
                    self._unload(model)
                else:
                    self._changed.wait(self._next_look())

    def _unused(self) -> ServedModel | None:
        """Return the idle model that is longest unused."""
        idle = (each for each in self.all if each.idle)
        return min(idle, key=lambda each: each.last_used, default=None)

    def _expired(self) -> ServedModel | None:
        """Return an idle model whose time is over."""
        now = monotonic()
        return next((each for each in self.all if each.idle and self._until(each) <= now), None)

    def _next_look(self) -> float | None:
        """Return in how many seconds the time of a model is over, if of any."""
        until = min((self._until(each) for each in self.all if each.idle), default=math.inf)
        return None if until == math.inf else max(0.0, until - monotonic())

    def _until(self, model: ServedModel) -> float:
        """Return when an idle model is to be freed, on the clock `monotonic`."""
        own, others = model.keep_seconds, self._idle_seconds
        seconds = own if own is not None else math.inf if others is None else others
        return model.last_used + seconds

    def _bring(self, model: ServedModel) -> None:
        """Load a model and give it to those who wait, once there is room."""
        while self._is_waited_for(model) and model.state == "unloading":
            self._changed.wait()
        try:
            if model.state == "unloaded" and not self._make_room_for(model):
                return
            if model.state == "unloaded":
                self._open(model)
        except BaseException as error:
            _log.exception("%s: could not be loaded", model.name)
            found = error if isinstance(error, Exception) else as_exception(error)
            model.trouble = type(found).__name__ if is_storage(found) else None
            model.refuse(found)
        if model.state == "loaded":
            model.grant()

    def _is_waited_for(self, model: ServedModel) -> bool:
        model.waiting = [each for each in model.waiting if not each.cancelled()]
        return bool(model.waiting) and not self._ended

    def _make_room_for(self, model: ServedModel) -> bool:
        """Take a model's share of the memory; False where nobody waits for it any more."""
        held: ServedModel | None = None
        try:
            while self._is_waited_for(model):
                if model.share is None or model.share.open():
                    return True
                idle = self._unused()
                if idle is not None:
                    _log.info("%s: freed, for %s needs the room", idle.name, model.name)
                    self._unload(idle)
                    continue
                if held is None:
                    held = self._least_recent()
                self._changed.wait()
            return False
        finally:
            if held is not None:
                self._release(held)

    def _least_recent(self) -> ServedModel | None:
        """Let the model in use that was longest not asked for take no new requests."""
        in_use = [each for each in self.all if each.state == "loaded" and each.open is not None]
        found = min(in_use, key=lambda each: each.last_used, default=None)
        if found is not None:
            found.held = True
        return found

    def _release(self, model: ServedModel) -> None:
        model.held = False
        if model.state == "loaded":  # another one went in its place
            model.grant()

    def _open(self, model: ServedModel) -> None:
        """Load a model whose memory is taken; the lock is open meanwhile."""
        assert model.open is not None
        model.state, service = "loading", None
        self._changed.release()
        try:
            service = model.open(model.share)
        finally:
            self._changed.acquire()
            if service is None:
                model.state = "unloaded"
                if model.share is not None:
                    model.share.close()
            else:
                model.take(service)
                self._loads += 1
                if model.share is not None:
                    model.share.settle()
            self._changed.notify_all()

    def _free_one(self) -> bool:
        """Free the idle model that is longest unused, for another that grows; False if none is."""
        with self._changed:
            model = self._unused()
            if model is None:
                return False
            self._unload(model)
            return True

    def _unload(self, model: ServedModel) -> None:
        """Free an idle model; the lock is open meanwhile."""
        service, model.service, model.state = model.service, None, "unloading"
        assert service is not None
        engine, closed = service.engine, False
        self._leaving.append(engine)
        self._changed.release()
        try:
            closed = service.close(_PATIENCE)
            self._note_past(engine)
            del service, engine
            gc.collect()  # grammars and texts of tokens are in circles
            give_back()
        finally:
            self._changed.acquire()
            model.state = "unloaded" if closed else "stuck"
            self._changed.notify_all()
        if closed and model.share is not None:
            model.share.close()
        if not closed:
            _log.error("%s: a step does not come back, so it could not be freed", model.name)

    def _note_past(self, engine: Engine) -> None:
        """Keep the sums of an engine that has ended."""
        with self._changed:
            done = replace(engine.statistics, slots=0, under_way=0, queued=0, kv_bytes=0)
            self._past = _sum([self._past, done])
            self._leaving.remove(engine)


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what an artifact tells without being loaded."""
    spec = manifest.model
    return {
        "max_model_len": spec.max_position_embeddings,
        "identity": spec.identity,
        "architecture": spec.architecture,
        "memory_layers": spec.memory.layers,
        "record_bytes": manifest.layout.record_bytes,
        "graph_weights": manifest.graph.weights,
        "table_codec": manifest.table.codec,
        "vocabulary": spec.vocab_size,
        "chat": True if TEMPLATE_FILE in manifest.files else None,  # None: the tokenizer knows
    }


def service_facts(service: Service) -> dict[str, Any]:
    """Return what is told of a model once it was loaded."""
    template, model = service.template, service.model
    return {
        **manifest_facts(model.manifest),
        "chat": template is not None,
        "tools": None if template is None else template_format(template).name,
        "max_tokens": service.settings.limits.max_tokens,
        "reader": model.reader,
        "device": model.device,
        "sampling": asdict(model.sampling),
        "overlays": list(model.overlays),
        "slots": service.engine.statistics.slots,
    }


def _sum(parts: Iterable[EngineStatistics]) -> EngineStatistics:
    found = list(parts)
    return EngineStatistics(
        **{each.name: sum(getattr(part, each.name) for part in found) for each in fields(found[0])}
    )


def _never_fits(model: ServedModel) -> ApiError:
    why = model.refusal or f"The model '{model.name}' does not fit the memory limit."
    return ApiError(400, why, code="model_does_not_fit", param="model")


def _ending() -> DrainingError:
    return DrainingError("The server is ending and takes no more requests.")
