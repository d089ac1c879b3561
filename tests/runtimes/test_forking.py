"""A process that is forked with a model open: nothing hangs, and what cannot work says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_memllm.process.forking import ProcessLock, Workers
from support.checkpoints import MakeArtifact

if not hasattr(os, "fork"):
    pytest.skip("no fork", allow_module_level=True)

PROGRAM = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
import edge_memllm
from edge_memllm.engine import Engine, Request

folder, threads, reader, what = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
prompt = "One after the other. " * 8
model = edge_memllm.load(folder, threads=threads, device="cpu", reader=reader, prefill_chunk=32)
wanted = model.generate(prompt, max_new_tokens=3, ignore_eos=True)
session = model.session()
session.append(prompt)
session.generate(max_new_tokens=2, ignore_eos=True)
engine = Engine(model, slots=1)
busy = threading.Event()

def work():
    with model.session() as mine, mine._turn.step:
        busy.set()
        time.sleep(60)

if what == "busy":  # a thread of the parent is in the middle of everything
    threading.Thread(target=work, daemon=True).start()
    busy.wait()
child = os.fork()
if child == 0:
    try:
        if what in ("close", "busy"):
            session.close()
            engine.close()
            model.close()
        elif what == "generate":
            assert model.generate(prompt, max_new_tokens=3, ignore_eos=True) == wanted
            session.append(prompt)
            session.generate(max_new_tokens=2, ignore_eos=True)
        elif what == "submit":
            engine.submit(Request(prompt="One"))
        elif what == "exit":
            del session, engine, model
        print("fine", flush=True)
    except edge_memllm.EdgeMemLLMError as error:
        print(error, flush=True)
    sys.exit(0)  # as a program ends: everything is freed
end = time.monotonic() + 20
while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
    time.sleep(0.01)
if done[0] == 0:
    print("hangs", flush=True)
    os.kill(child, 9)
elif done[1]:
    print("ends with", done[1], flush=True)
if what != "busy":
    assert model.generate(prompt, max_new_tokens=3, ignore_eos=True) == wanted
    engine.close()
    model.close()
os._exit(0)
"""


def forked(folder: Path, threads: int, reader: str, what: str) -> str:
    """What a child says, and how it ends if not well."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(threads), reader, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("what", ["close", "exit", "busy"])
def test_closing_and_ending_return(what: str, threads: int, make_artifact: MakeArtifact) -> None:
    assert forked(make_artifact(graph_weights="fp32"), threads, "pread", what) == "fine"


def test_a_graph_with_threads_is_of_its_process(make_artifact: MakeArtifact) -> None:
    said = forked(make_artifact(graph_weights="fp32"), 4, "pread", "generate")
    assert "was loaded before this process was forked" in said
    assert "Load the model in each process" in said


@pytest.mark.parametrize("reader", ["pread", "ram", "direct", "uring"])
def test_a_graph_without_threads_works_in_a_child(reader: str, make_artifact: MakeArtifact) -> None:
    said = forked_or_skip(make_artifact(graph_weights="fp32"), reader)
    assert said == "fine"


def forked_or_skip(folder: Path, reader: str) -> str:
    try:
        return forked(folder, 1, reader, "generate")
    except AssertionError as error:
        if "Use the reader" in str(error):
            pytest.skip("not here")
        raise


def test_an_engine_is_of_its_process(make_artifact: MakeArtifact) -> None:
    said = forked(make_artifact(graph_weights="fp32"), 1, "pread", "submit")
    assert said == (
        "The engine's thread is not of this process, which was forked from the one that started "
        "it. Start an engine in each process."
    )


# --- the parts -----------------------------------------------------------------------------------


def in_a_child(work: object) -> int:
    """The exit code of a child that calls it."""
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 1)  # type: ignore[operator]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_lock_is_open_in_a_child() -> None:
    lock = ProcessLock()
    with lock:
        assert not lock.acquire(blocking=False)
        assert in_a_child(lambda: lock.acquire(timeout=1)) == 0
        assert not lock.acquire(blocking=False)
    assert lock.acquire(blocking=False)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_start_anew_in_a_child() -> None:
    workers, end = Workers(1, "a test's"), threading.Event()
    blocked = workers.submit(end.wait)
    assert in_a_child(lambda: workers.submit(os.getpid).result(5) == os.getpid()) == 0
    end.set()
    assert blocked.result(5)
    workers.close()
    workers.close()
    assert workers.submit(os.getpid).result(5) == os.getpid()
    workers.close()
