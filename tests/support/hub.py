"""A pretended Hugging Face Hub, and prompts and settings of what speaks to transformers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from threading import Thread
from typing import Any

import pytest

from support.checkpoints import PAD

NAME = "some/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)")


_ENDLESS = 500 << 20  # bytes, so that a test ends


@dataclass
class FakeHub:
    """`files[repository][name]` is content; `token` guards all, `gated` names one repository."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: str | None = None
    moved_to: str | None = None  # another server that has the files, as the real one's storage
    forbidden: str | None = None  # a header that must not come here
    break_after: dict[str, int] = field(default_factory=dict)  # bytes of a file, once
    endless: str | None = None  # a file that never ends, once it is sent
    sent: int = 0  # bytes of it
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, range
    endpoint: str = ""

    def add_folder(self, repository: str, folder: Path) -> dict[str, bytes]:
        self.files[repository] = {file.name: file.read_bytes() for file in folder.iterdir()}
        return self.files[repository]

    def downloads(self) -> list[str]:
        return [name for method, name, _ in self.asked if method == "GET"]


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve until the block ends; `hub.endpoint` says where."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
    """Let `huggingface_hub` speak to this hub, without waiting, and keep its caches in a folder."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets

    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(caches / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(caches / "assets"))
    for module in ("file_download", "utils._http"):  # which wait before they try again
        monkeypatch.setattr(f"huggingface_hub.{module}.time.sleep", lambda _: None)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        hub = self.hub
        found = _FILE.fullmatch(self.path.partition("?")[0]) or _API.match(self.path)
        repository = found[1] if found else ""
        if hub.forbidden and hub.forbidden in self.headers:
            self._refuse(400, "")
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(401, "RepoNotFound")
        elif found is None or repository not in hub.files:
            self._refuse(404, "RepoNotFound")
        elif repository == hub.gated:
            self._refuse(403, "GatedRepo")
        elif found.re is _API:
            self._list(repository, found[2], found[3])
        elif found[2] not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif found[3] not in hub.files[repository]:
            self._refuse(404, "EntryNotFound")
        elif hub.moved_to is not None:
            self._redirect(hub.moved_to, hub.files[repository][found[3]])
        else:
            self._file(found[3], hub.files[repository][found[3]], with_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, endpoint: str, content: bytes) -> None:
        self.send_response(302)
        self.send_header("Location", endpoint + self.path)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-Etag", f'"{_digest(content)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, repository: str, kind: str, revision: str) -> None:
        if kind == "revision":
            content: object = {"id": repository, "sha": COMMIT, "siblings": []}
        else:
            content = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in self.hub.files[repository].items()
            ]
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, content: bytes, with_body: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.hub.asked.append((self.command, name, wanted))
        start = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
        body = content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_digest(content)}"')
        self.send_header("Accept-Ranges", "bytes")
        if not (with_body and name == self.hub.endless):
            self.send_header("Content-Length", str(len(body)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        while name == self.hub.endless and self.hub.sent < _ENDLESS:
            try:
                self.hub.sent += self.wfile.write(bytes(1 << 20))
            except OSError:  # whoever asked has gone
                self.close_connection = True
                return
        until = self.hub.break_after.pop(name, None)
        self.wfile.write(body[:until])
        if until is not None:
            self.wfile.flush()
            self.connection.shutdown(SHUT_RDWR)
            self.close_connection = True


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


EXACT = {"graph_weights": "fp32", "table_codec": "f32"}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
TEXT = "A token becomes a row. "


def ids(*rows: str) -> Any:
    """Rows of bytes of one length, as a tensor."""
    import torch

    return torch.tensor([list(row.encode()) for row in rows])


def padded(*rows: str) -> dict[str, Any]:
    """Rows of bytes, padded on the left."""
    import torch

    width = max(map(len, rows))
    tokens = [[PAD] * (width - len(row)) + list(row.encode()) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
