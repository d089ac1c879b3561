"""The desktop example: its worker alone, its window on a virtual screen, and packed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm import Sampling
from support import ROOT
from support.chat_program import chat_once
from support.checkpoints import MakeArtifact
from support.virtual_screen import VirtualScreen, virtual_screen, wait_for

EXAMPLE = ROOT / "examples" / "desktop"
TEXT = "Once upon a time"
GREEDY = Sampling()
_PAPER, _GO_ON = (0xFF, 0xFE, 0xFB), (0x0F, 0x6B, 0x5C)  # of examples/desktop/style.py


def there(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in modules)


needs_screen = pytest.mark.skipif(
    not there("tkinter") or shutil.which("Xvfb") is None,
    reason="needs tkinter and the program Xvfb",
)
needs_packer = pytest.mark.skipif(not there("PyInstaller"), reason="needs PyInstaller")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    worker = importlib.import_module("worker").Worker()
    yield worker
    worker.close()
    del sys.modules["worker"]


def events_until_end(worker: Any, each: Callable[[Any], None] = lambda _: None) -> list[Any]:
    found: list[Any] = []
    limit = time.monotonic() + 60
    while not found or type(found[-1]).__name__ != "Ended":
        assert time.monotonic() < limit
        for event in worker.events():
            each(event)
            found.append(event)
        time.sleep(0.002)
    return found


def written(events: list[Any]) -> str:
    return "".join(event.text for event in events if type(event).__name__ == "Wrote")


def test_the_worker_loads_and_goes_on(worker: Any, make_artifact: MakeArtifact) -> None:
    worker.load(make_artifact())
    loading = events_until_end(worker)
    assert {type(event).__name__ for event in loading} == {"Loading", "Loaded", "Ended"}
    assert loading[-1].problem == ""
    worker.go_on(TEXT, GREEDY, 12)
    first = events_until_end(worker)
    assert first[-2].figures.tokens == 12
    assert first[-2].figures.read_bytes_per_token > 0
    worker.go_on(TEXT + "!", GREEDY, 3)
    assert events_until_end(worker)[-2].figures.reused == len(TEXT) - 1


def test_the_worker_stops_and_is_still_usable(worker: Any, make_artifact: MakeArtifact) -> None:
    worker.load(make_artifact())
    events_until_end(worker)
    worker.go_on(TEXT, GREEDY, 400)

    def stop(event: Any) -> None:
        if type(event).__name__ == "Wrote":
            worker.stop()

    stopped = events_until_end(worker, stop)
    assert stopped[-1].problem == ""
    assert len(stopped) < 300
    worker.go_on(TEXT, GREEDY, 4)
    assert len(events_until_end(worker)) == 5


def test_the_worker_says_what_is_wrong(
    worker: Any, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    worker.load(tmp_path)
    assert "manifest.json" in events_until_end(worker)[-1].problem
    worker.go_on(TEXT, GREEDY, 4)
    assert len(events_until_end(worker)) == 1
    worker.load(make_artifact())
    events_until_end(worker)
    worker.go_on("x" * 1000, GREEDY, 4)
    assert "context holds" in events_until_end(worker)[-1].problem


def shown(screen: VirtualScreen, command: list[str], report: Path) -> dict[str, Any]:
    """Start the program, wait until it has gone on with a text, look at the screen, end it."""
    command = [*command, "--report", str(report), "--text", TEXT]
    environment = {"PATH": os.defpath, "HOME": str(report.parent), **screen.environment}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        try:
            wait_for(report, program, 120)
            look_at(screen)
        finally:
            program.terminate()
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def look_at(screen: VirtualScreen) -> None:
    """A page with writing on it, and the button to go on; drawn a moment after the report."""
    limit = time.monotonic() + 20
    while not (share(screen, _PAPER) > 0.4 and share(screen, _GO_ON) > 0.005):
        assert time.monotonic() < limit, (share(screen, _PAPER), share(screen, _GO_ON))
        time.sleep(0.1)
    lines = (screen.pixels()[80:500, 40:800] != _PAPER).any(axis=2)
    assert 0.005 < lines.mean() < 0.5


def share(screen: VirtualScreen, colour: tuple[int, int, int]) -> float:
    return float((screen.pixels() == np.array(colour, np.uint8)).all(axis=2).mean())


def check_report(report: dict[str, Any]) -> None:
    assert report["problem"] == ""
    assert report["text"].startswith(TEXT)
    assert report["figures"]["tokens"] == 120
    assert report["figures"]["tokens_per_second"] > 0


@needs_screen
def test_the_window_goes_on_with_a_text(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "app.py"), str(artifact_without_end(make_artifact))]
    with virtual_screen(tmp_path) as screen:
        check_report(shown(screen, command, tmp_path / "report.json"))


PRESS = """
import sys, tkinter as tk
from window import Window
class Still:
    went_on = stopped = 0
    def events(self): return []
    def load(self, path): pass
    def go_on(self, *asked): self.went_on += 1
    def stop(self): self.stopped += 1
worker = Still()
window = Window(worker, [])
window._choice.set("a model")
window._page.insert("end", "A beginning")
window._page.focus_force()
window._root.update()
for key in ("<Control-Return>", "<Control-KP_Enter>", "<Return>"):
    window._busy = False
    window._page.event_generate(key)
    window._root.update()
    print(key, worker.went_on, repr(window._text()))
"""


@needs_screen
def test_the_key_that_goes_on_writes_nothing(tmp_path: Path) -> None:
    with virtual_screen(tmp_path) as screen:
        done = subprocess.run(
            [sys.executable, "-c", PRESS],
            cwd=EXAMPLE,
            env={**os.environ, **screen.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout.splitlines() == [
        "<Control-Return> 1 'A beginning'",
        "<Control-KP_Enter> 2 'A beginning'",
        "<Return> 2 'A beginning\\n'",
    ], done.stderr


@pytest.mark.desktop
@needs_screen
@needs_packer
def test_the_packed_program_runs_without_python(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    model = shutil.copytree(artifact_without_end(make_artifact), tmp_path / "a-model")
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", "--noconfirm", "--distpath", str(tmp_path / "dist"),
         "--workpath", str(tmp_path / "build"), str(EXAMPLE / "desktop.spec")],
        env={**os.environ, "EDGE_MEMLLM_MODELS": str(model),
             "PYINSTALLER_CONFIG_DIR": str(tmp_path)},
        check=True, capture_output=True, timeout=500,
    )  # fmt: skip
    packed = tmp_path / "dist" / "edge-memllm-desktop"
    names = {path.name.split(".")[0] for path in packed.rglob("*")}
    assert not names & {"torch", "transformers", "onnx", "sklearn"}
    if there("edge_memllm_kernels"):
        assert [
            path for path in packed.rglob("*edge_memllm_kernels.*") if path.stat().st_size > 1000
        ]
    size = sum(path.stat().st_size for path in packed.rglob("*") if path.is_file())
    assert size < 250_000_000
    with virtual_screen(tmp_path) as screen:
        check_report(shown(screen, [str(packed / "edge-memllm-desktop")], tmp_path / "report.json"))
    ((_, said),) = chat_once([str(packed / "edge-memllm-chat")], tmp_path, TEXT)
    assert said


def artifact_without_end(make_artifact: MakeArtifact) -> Path:
    """A model whose random texts do not end: no token ends them."""
    return make_artifact(eos_token_id=None)
