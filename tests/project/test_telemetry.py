"""ONNX Runtime tells nobody that it is used: no file appears, and no name is looked up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_memllm_runtimes.ort_library import import_library
from support.checkpoints import MakeArtifact, MakeCheckpoint
from support.programs import no_network
from support.runtimes import ARTIFACTS

VARIABLE = "ORT_DISABLE_TELEMETRY"
# The library looks its host up some 8 seconds after it was imported.
PATIENCE = 10

GENERATE = """
import sys, time, edge_memllm
began = time.monotonic()
with edge_memllm.load({path!r}, device="cpu", threads=1) as model:
    model.generate("A", max_new_tokens=2)
time.sleep(max(0, began + {patience} - time.monotonic()))
"""
COMMAND = """
import runpy, sys
sys.argv = ["edge-memllm", *{arguments!r}]
runpy.run_module("edge_memllm.cli.main", run_name="__main__")
"""
TRANSFORMERS = """
from edge_memllm.huggingface import EdgeMemLLMForCausalLM
import torch
with EdgeMemLLMForCausalLM.from_pretrained({path!r}, threads=1) as model:
    model.generate(torch.tensor([[65]]), max_new_tokens=2)
"""


def run(program: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run it where nobody has decided, in a home of its own, without a network."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    folders = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "TMPDIR"), str(home))
    home.mkdir()
    done = subprocess.run(
        [sys.executable, no_network.__file__],
        input=program,
        env=environment | folders,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == no_network.NOT_HERE:
        pytest.skip("the network cannot be forbidden on this system")
    return done


def test_a_lookup_would_be_found(tmp_path: Path) -> None:
    done = run("import socket; socket.getaddrinfo('name.invalid', 80)", tmp_path / "home")
    assert done.returncode == -signal.SIGSYS


@pytest.mark.parametrize("way", ["load", "run", "export", "transformers"])
def test_nothing_is_written_and_nothing_looked_up(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint, tmp_path: Path, way: str
) -> None:
    path = str(make_artifact(**ARTIFACTS["int4"]))
    match way:
        case "load":
            program = GENERATE.format(path=path, patience=PATIENCE)
        case "run":
            program = COMMAND.format(
                arguments=["run", path, "--prompt", "A", "--max-new-tokens", "2"]
            )
        case "export":
            out = str(tmp_path / "out")
            program = COMMAND.format(arguments=["export", str(make_checkpoint()), out])
        case _:
            program = TRANSFORMERS.format(path=path)
    home = tmp_path / "home"
    done = run(program, home)
    assert done.returncode == 0, done.stderr
    assert [str(found.relative_to(home)) for found in home.rglob("*")] == []


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_a_value_of_the_environment_stays(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    asked: list[str] = []
    library = SimpleNamespace(disable_telemetry_events=lambda: asked.append("disabled"))
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    monkeypatch.delenv(VARIABLE)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    assert import_library() is library
    assert os.environ[VARIABLE] == expected
    # For a program that had imported it before us, which may have begun to collect events.
    assert asked == ([] if given else ["disabled"])
