"""A plugin of pytest: llama.cpp's `ServerProcess` starts `edge-memllm serve` instead.

What an option of llama-server is called here stands in `_options`; what it has as defaults of
requests and `serve` has not, `_with_defaults` gives with each request. Runs within llama.cpp's
checks, so it imports nothing of this package but its lists.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import utils  # type: ignore[import-not-found]  # llama.cpp's

from benchmarks.llama_server.edits import NAMES, ORIGINS, STORIES
from benchmarks.llama_server.selection import reason_against

WORK = Path(os.environ["LLAMA_SERVER_WORK"])
CONTEXTS = (256, 512, 2048, 4096, 8192)
_PROMPTED = ("/completion", "completions", "/responses", "/messages")
_LIMITS = {"completion": "n_predict", "responses": "max_output_tokens"}
_START_SECONDS = 600
_FORMS = {"response_format", "json_schema", "grammar", "tools"}


def pytest_collection_modifyitems(config: Any, items: list[pytest.Item]) -> None:
    """Leave out what does not apply."""
    left = [each for each in items if _reason(each) is not None]
    items[:] = [each for each in items if _reason(each) is None]
    config.hook.pytest_deselected(items=left)


def _reason(item: pytest.Item) -> str | None:
    return reason_against(item.nodeid, slow=item.get_closest_marker("slow") is not None)


class _Running:
    """The server that runs. The next check that starts one with the same options has it as well."""

    words: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether it answers, or will."""
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        """End it, if there is one."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
        self.process = None


RUNNING = _Running()


def _start(server: Any, timeout_seconds: int = 120) -> None:
    words = [sys.executable, "-m", "edge_memllm", "serve", *_options(server)]
    print("tests: starting server with:", *words[3:])
    utils.server_instances.add(server)
    if words == RUNNING.words and RUNNING.alive and not _wants_its_own(server):
        return
    RUNNING.end()
    log = open(server.log_path or WORK / "server.log", "a")  # noqa: SIM115 - the server's, to its end
    process = subprocess.Popen(words, stdout=log, stderr=log)
    RUNNING.words, RUNNING.process = words, process
    until = time.monotonic() + max(timeout_seconds, _START_SECONDS)
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"serve ended with {process.returncode}")
        try:
            if requests.get(server.make_url("/health"), timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise TimeoutError("serve is not there in time")


def _wants_its_own(server: Any) -> bool:
    """Whether what went on before would matter: what is cached, counted or asleep."""
    about = os.environ["PYTEST_CURRENT_TEST"]
    return server.sleep_idle_seconds is not None or "cached" in about or "metrics" in about


def pytest_unconfigure() -> None:
    """End what still runs."""
    RUNNING.end()


def _options(server: Any) -> Iterator[str]:
    """Yield what llama-server's options are here; its defaults that differ, too."""
    slots = server.n_slots or 1
    context = (server.n_ctx or 4096) // (1 if server.kv_unified else slots)
    yield str(WORK / "models" / str(next(each for each in CONTEXTS if each >= context)))
    given = {
        "--port": server.server_port,
        "--slots": slots,
        "--threads": 1,
        "--seed": server.seed,
        "--prefill-chunk": server.n_batch,
        "--api-key": server.api_key,
        "--idle-unload": server.sleep_idle_seconds,
        "--chat-template": _template(server),
        "--speculate": server.spec_draft_n_max if server.spec_type else None,
        "--reasoning": {None: None, "auto": "on"}.get(server.reasoning, server.reasoning),
    }
    for option, value in given.items():
        yield from () if value is None else (option, str(value))
    for host in server.server_host.split(","):
        yield from ("--host", host)
    names = sorted((server.model_alias or "model").split(","))
    yield from ("--name", names[0])
    about = os.environ["PYTEST_CURRENT_TEST"]
    about_models = "test_basic.py" in about or "test_sleep.py" in about
    for name in (*names[1:], *(() if about_models else NAMES)):
        yield from ("--alias", name)
    if server.no_ui:
        yield "--no-page"
    for origin in ORIGINS if "cors" in about else ():  # there every page may ask
        yield from ("--cors", origin)


def _template(server: Any) -> Path:
    """Return the file of the template asked for: one of its files, one built in, or a text."""
    if server.chat_template_file:
        return WORK / "templates" / Path(server.chat_template_file).name
    built_in = Path(__file__).with_name("templates") / f"{server.chat_template or 'chatml'}.jinja"
    if built_in.exists():
        return built_in
    path = WORK / "template.jinja"
    path.write_text(server.chat_template, "utf-8")
    return path


def _with_defaults(server: Any, method: str, path: str, data: Any) -> Any:
    """Add what `--n-predict`, `--temp` and `--verbose` are there: defaults of requests."""
    counting = "token" in path.rsplit("/", 1)[-1]
    if method != "POST" or not isinstance(data, dict) or counting or not path.endswith(_PROMPTED):
        return data
    kind = path.rsplit("/", 1)[-1]
    limit, own = _LIMITS.get(kind, "max_tokens"), dict(data)
    if (server.n_predict or 0) > 0 and not {"n_predict", "max_tokens", limit} & own.keys():
        own[limit] = server.n_predict
    if server.temperature != 0.8:
        own.setdefault("temperature", server.temperature)
    if path.endswith("/chat/completions"):
        if not _FORMS & own.keys():  # this model has an end to its texts, theirs has not
            own.setdefault("ignore_eos", True)
        if server.debug:
            own.setdefault("verbose", True)
    return own


def _match(regex: str, text: str) -> bool:
    return bool(text) if regex in STORIES else bool(_own_match(regex, text))


_own_match, utils.match_regex = utils.match_regex, _match
_request, _streamed = utils.ServerProcess.make_request, utils.ServerProcess.make_stream_request


def _make_request(
    self: Any, method: str, path: str, data: Any = None, *more: Any, **named: Any
) -> Any:
    return _request(self, method, path, _with_defaults(self, method, path, data), *more, **named)


def _make_stream_request(
    self: Any, method: str, path: str, data: Any = None, *more: Any, **named: Any
) -> Any:
    given = _with_defaults(self, method, path, data)
    yield from _streamed(self, method, path, given, *more, **named)


utils.ServerProcess.start = _start
utils.ServerProcess.stop = lambda server: None
utils.ServerProcess.make_request = _make_request
utils.ServerProcess.make_stream_request = _make_stream_request
utils.ServerPreset.load_all = staticmethod(lambda: None)
