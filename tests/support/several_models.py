"""Several models behind one address, over the fake runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_memllm.engine import Engine
from edge_memllm.loading import plan_loading
from edge_memllm.process.memory_account import MemoryAccount, MemoryShare
from edge_memllm.server.models import ServedModel, ServedModels, manifest_facts
from edge_memllm.server.server import Server, bound_socket
from edge_memllm.server.service import ServerState, Service
from edge_memllm.server.settings import Settings
from support.engine import GatedRuntime, wait_until
from support.small_model import open_small_model

NAMES = ("a", "b", "c")
SHARE = 1000


class Home:
    """Models over the fake runtime, and every runtime that was ever opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[str] = []
        self.runtimes: dict[str, GatedRuntime] = {}
        self.state = ServerState(Settings("a"))

    def open(self, name: str) -> Callable[[MemoryShare | None], Service]:
        def opening(share: MemoryShare | None) -> Service:
            self.opened.append(name)
            runtime = self.runtimes.setdefault(name, GatedRuntime())
            engine = Engine(open_small_model(self.folder, runtime), slots=2, queue=200)
            return Service(engine, Settings(name), None, self.state)

        return opening

    def models(self, room: int | None = None, idle: float | None = None) -> ServedModels:
        account = None if room is None else MemoryAccount(room * SHARE)
        facts = manifest_facts(plan_loading(self.folder)[0])
        found = [
            ServedModel(
                name,
                self.open(name),
                facts,
                share=None if account is None else MemoryShare(account, SHARE, 0, 0),
            )
            for name in NAMES
        ]
        return ServedModels(self.state, found, account=account, idle_seconds=idle)


@contextmanager
def served(models: ServedModels) -> Iterator[str]:
    with bound_socket("127.0.0.1", 0) as bound:
        server = Server(models)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert models.close(5)
            assert not thread.is_alive()
