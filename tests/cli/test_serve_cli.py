"""``edge-memllm serve``: its options, what it says, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_memllm.cli import serve
from edge_memllm.cli.main import build_parser, main
from edge_memllm.cli.options import options_of
from edge_memllm.cli.serve import ServeOptions, settings_of
from edge_memllm.errors import RequestError
from edge_memllm.server.server import bound_socket, bound_sockets
from edge_memllm.server.settings import KEY_VARIABLE, Limits, Settings
from support.checkpoints import MakeArtifact

KEY = "a-long-enough-key"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def parsed(*words: str) -> ServeOptions:
    return options_of(ServeOptions, build_parser("serve").parse_args(["serve", *words]))


def settings(*words: str) -> Settings:
    return settings_of(parsed("artifact-x", *words))


def test_left_out_the_options_are_the_defaults() -> None:
    assert settings() == Settings("artifact-x")


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("  key-of-file-1 \n\nkey-of-file-2\nkey-of-file-1\n", encoding="utf-8")
    monkeypatch.setenv(KEY_VARIABLE, "key-of-environment")
    found = settings(
        *("--host", "0.0.0.0", "--name", "my model", "--drain-seconds", "3", "--log-requests"),
        *("--api-key", KEY, "--api-key-file", str(keys), "--cors", "https://a", "--cors", "*"),
        *("--allow-host", "ai.lan", "--max-tokens", "9", "--max-prompt", "8", "--max-choices", "7"),
        *("--max-body", "1MiB", "--timeout", "2.5", "--seed", "7", "--speculate", "8"),
        *("--reasoning", "off"),
    )
    assert found == Settings(
        "my model",
        addresses=("0.0.0.0",),
        api_keys=(KEY, "key-of-environment", "key-of-file-1", "key-of-file-2"),
        origins=("https://a", "*"),
        hosts=("ai.lan",),
        drain_seconds=3.0,
        seed=7,
        reasoning="off",
        speculate=8,
        log_requests=True,
        limits=Limits(
            prompt_tokens=8, max_tokens=9, choices=7, body_bytes=1 << 20, reply_seconds=2.5
        ),
    )


def test_what_requests_get_is_checked_at_the_start() -> None:
    with pytest.raises(RequestError, match="speculate is 65, expected an integer from 0 to 64"):
        settings("--speculate", "65")
    with pytest.raises(RequestError, match="seed is -1"):
        settings("--seed", "-1")


def test_the_name_is_that_of_the_folder_or_of_the_hub(tmp_path: Path) -> None:
    def name(path: str) -> str:
        return settings_of(parsed(path)).model_id

    (tmp_path / "tiny").mkdir()
    assert name(str(tmp_path / "tiny" / "..") + "/tiny/") == "tiny"
    assert name("no-such-org/model-y") == "no-such-org/model-y"
    assert name("hf://org/model@v1") == "org/model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key", "short"], "an API key has 5 characters, expected 8 or more"),
        (["--api-key", "with a space"], "without spaces"),
        (["--name", "a\nb"], "which nobody can type. Give --name"),
        (["--name", " "], "which nobody can type"),
        (["--cors", "example.org"], "--cors 'example.org' is no origin"),
        (["--cors", "*", "--cors", "https://a/"], "--cors 'https://a/' never matches"),
        (["--allow-host", "ai.lan:80"], "--allow-host 'ai.lan:80' never matches"),
        (["--max-choices", "9", "--queue", "8"], "--queue 8: a request of that many replies would"),
        (["--per-client", "8"], "--max-choices is 16 and --per-client 8: a request of that many"),
    ],
)
def test_options_that_cannot_be(words: Sequence[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "x"], "--name is for one model, and 2 are served"),
        (["--alias", "x"], "--alias is for one model"),
        (["--overlay", "x"], "--overlay is for one model"),
        (["--vram-limit", "1GB"], "--vram-limit is for one model"),
    ],
)
def test_what_is_for_one_model_is_refused_for_several(words: Sequence[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings_of(parsed("one", "two", *words))


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(RequestError, match="two models are called 'same'"):
        settings_of(parsed("/x/same", "/y/same"))


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n", encoding="utf-8")
    with pytest.raises(RequestError, match="no key in it"):
        settings("--api-key-file", str(tmp_path / "keys"))


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_ports_that_are_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "a", "--port", port]) == 2
    assert "--port" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", "nowhere"]) == 1
    assert "pip install '.[serve]'" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 1
    shown = capsys.readouterr().err
    assert f"error: port {port} of 127.0.0.1 cannot be used: " in shown
    assert "Choose another with --port." in shown


def test_loggers_are_as_they_were_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("edge_memllm", "uvicorn")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    assert main(["serve", "nowhere", "--port", "0", "--log-requests"]) == 1
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
    assert "error: nowhere" in capsys.readouterr().err


def test_an_address_that_is_none() -> None:
    with pytest.raises(RequestError, match="no address here"):
        bound_socket("256.1.1.1", 0)


def test_small_writes_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off only for sockets that are TCP by name."""
    with bound_socket("localhost", 0) as found:
        assert found.proto == socket.IPPROTO_TCP


@contextmanager
def served(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A server as a program, and what it says of itself."""
    command = [sys.executable, "-m", "edge_memllm.cli.main", "serve", *words]
    with subprocess.Popen(
        [*command, "--port", "0", "--json", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            while not lines or lines[-1] != "}\n":
                line = process.stdout.readline()
                assert line, process.stderr and process.stderr.read()
                lines.append(line)
            yield process, json.loads("".join(lines))
        finally:
            process.kill()


def wait_for(url: str, **headers: str) -> None:
    limit = time.monotonic() + 20
    while True:
        try:
            assert httpx.get(f"{url}/health", headers=headers).status_code == 200
        except httpx.ConnectError:
            assert time.monotonic() < limit
            time.sleep(0.02)
        else:
            return


def test_one_command_serves_and_a_signal_ends_it(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "utf-8")
    words = ["--name", "m", "--chat-template", str(template), "--log-requests"]
    with served(str(make_artifact()), *words, **{KEY_VARIABLE: KEY}) as (process, said):
        told = {
            "url": "",
            "urls": [said["url"]],
            "model": "m",
            "models": ["m"],
            "slots": 4,
            "chat": True,
        }
        assert said | {"url": ""} == told
        wait_for(said["url"])
        key = {"authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{said['url']}/v1/models").status_code == 401
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        reply = httpx.post(f"{said['url']}/v1/chat/completions", json=asked, headers=key)
        assert reply.json()["usage"]["prompt_tokens"] == 4  # <s> H i </s>
        named = key | {"x-request-id": "abc-1"}
        httpx.get(f"{said['url']}/a%0d%0a%1b[31mb", headers=named)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "127.0.0.1 POST /v1/chat/completions 200 " in errors
    assert re.search(r"GET /a\\r\\n\\x1b\[31mb 404 \d\.\d+ s abc-1\n", errors)
    assert f" s {reply.headers['x-request-id']}\n" in errors
    assert KEY not in errors
    assert "Traceback" not in errors


def test_a_second_signal_ends_it_at_once(make_artifact: MakeArtifact) -> None:
    words = ["--drain-seconds", "60", "--host", "localhost"]
    with served(str(make_artifact()), *words) as (process, said):
        wait_for(said["url"])
        asked = {"prompt": "x", "max_tokens": 400, "n": 16, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{said['url']}/v1/completions", json=asked) as response:
            parts = response.iter_raw()
            next(parts)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT, errors
    assert time.monotonic() - start < 2
    assert "Traceback" not in errors


def test_listening_to_others_without_a_key_is_said_loudly(make_artifact: MakeArtifact) -> None:
    with served(str(make_artifact()), "--host", "0.0.0.0") as (process, said):
        assert said["url"].startswith("http://0.0.0.0:")
        wait_for(said["url"].replace("0.0.0.0", "127.0.0.1"), host="anything.example")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert "warning: anybody who reaches 0.0.0.0 can use this server" in errors
    assert process.returncode == 0


def test_a_socket_of_this_machine_is_free_again_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with bound_sockets((f"unix:{path}", "127.0.0.1", "localhost"), 0) as found:
        ports = {each.getsockname()[1] for each in found[1:]}
        assert len(ports) == 1  # a free port is the same for all
        found[0].listen()
        with (
            pytest.raises(RequestError, match=r"s\.sock cannot be used: Address already in use"),
            bound_sockets((f"unix:{path}",), 0),
        ):
            pass
    assert not path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
        gone.bind(str(path))  # one that a server left behind
    with bound_sockets((f"unix:{path}",), 0):
        assert path.exists()
    path.write_text("precious")
    with (
        pytest.raises(RequestError, match="Choose another path"),
        bound_sockets((f"unix:{path}",), 0),
    ):
        pass
    assert path.read_text() == "precious"


def test_several_addresses_serve_at_once(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    hosts = ["--host", "127.0.0.1", "--host", f"unix:{path}", "--idle-unload", "60"]
    with served(str(make_artifact()), *hosts) as (process, said):
        assert said["urls"] == [said["url"], f"unix:{path}"]
        body = {"prompt": "Hello", "max_tokens": 2, "temperature": 0}
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            by_path = client.post("http://localhost/v1/completions", json=body).json()
            assert client.get("http://other.example/v1/models").status_code == 403
        by_port = httpx.post(said["url"] + "/v1/completions", json=body).json()
        assert by_path["choices"] == by_port["choices"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not path.exists()
