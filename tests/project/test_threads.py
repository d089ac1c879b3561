"""Several threads and several models in one process, and memory that comes back."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm import Model, RequestError, Sampling
from edge_memllm.errors import Cancellation, GenerationCancelledError
from edge_memllm.overlays import Edit, Overlay, OverlaySpec, overlay_of
from support.checkpoints import MakeArtifact
from support.overlays import row
from support.small_model import open_small_model

PROMPT = "one and another"
WARM = Sampling(temperature=0.8)


def overlay(model: Model, name: str, letter: str) -> Overlay:
    spec = OverlaySpec.for_model(model.manifest, name, codec="f32")
    return overlay_of(spec, [Edit(model.tokenize(letter)[0], 0, "replace", row(3))])


def said(model: Model, seed: int, overlays: tuple[str, ...] = ()) -> str:
    return model.generate(
        PROMPT, max_new_tokens=10, ignore_eos=True, seed=seed, sampling=WARM, overlays=overlays
    )


def test_texts_are_right_while_everything_else_happens(folder: Path) -> None:
    """Threads generate, in sessions too, while others load, close, cancel and switch overlays."""
    with open_small_model(folder) as model:
        model.add_overlay(overlay(model, "kept", "n"))
        wanted = {seed: (said(model, seed), said(model, seed, ("kept",))) for seed in range(4)}
        ended = threading.Event()

        def generate(seed: int) -> None:
            for _ in range(12):
                assert (said(model, seed), said(model, seed, ("kept",))) == wanted[seed]
                with model.session(seed=seed, sampling=WARM, overlays=()) as session:
                    session.append(PROMPT)
                    assert session.generate(max_new_tokens=10, ignore_eos=True) == wanted[seed][0]

        def switch() -> None:
            while not ended.is_set():
                model.add_overlay(overlay(model, "passing", "e"))
                said(model, 0, ("kept", "passing"))
                model.remove_overlay("passing")

        def reload() -> None:
            while not ended.is_set():
                with open_small_model(folder) as other:
                    assert said(other, 1) == wanted[1][0]

        def cancel() -> None:
            while not ended.is_set():
                cancellation = Cancellation()
                stream = model.stream(PROMPT, ignore_eos=True, cancellation=cancellation)
                next(stream)
                cancellation.cancel()
                with pytest.raises(GenerationCancelledError):
                    next(stream)

        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(work) for work in (switch, reload, cancel)]
            try:
                for done in [pool.submit(generate, seed) for seed in wanted]:
                    done.result(60)
            finally:
                ended.set()
            for other in others:
                other.result(60)


def test_closing_under_way_is_safe(folder: Path) -> None:
    """Texts under way end as they should; later ones are refused; nothing is freed under them."""
    for _ in range(10):
        model = open_small_model(folder)
        wanted, start = said(model, 1), threading.Barrier(5)

        def generate(model: Model = model, start: threading.Barrier = start) -> str | None:
            start.wait(10)
            try:
                return said(model, 1)
            except RequestError:
                return None

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(generate) for _ in range(4)]
            start.wait(10)
            model.close()
            assert {each.result(30) for each in running} <= {wanted, None}
        with pytest.raises(RequestError, match="The model is closed"):
            said(model, 1)


def test_two_models_live_side_by_side(make_artifact: MakeArtifact) -> None:
    folders = [make_artifact(beta=3), make_artifact(graph_weights="fp32", seed=7)]

    def alone(folder: Path) -> str:
        with edge_memllm.load(folder, device="cpu", threads=1) as model:
            return said(model, 1)

    wanted = [alone(folder) for folder in folders]
    models = [edge_memllm.load(folder, device="cpu", threads=1) for folder in folders]
    streams = [
        model.stream(PROMPT, max_new_tokens=10, ignore_eos=True, seed=1, sampling=WARM)
        for model in models
    ]
    both = list(zip(*streams, strict=True))
    assert ["".join(piece.text for piece in side) for side in zip(*both, strict=True)] == wanted
    models[0].close()
    assert said(models[1], 1) == wanted[1]
    models[1].close()


MEMORY = """
import gc, sys
import edge_memllm
from edge_memllm.statistics import process_memory

def used():
    with edge_memllm.load(sys.argv[1], device="cpu", threads=1, reader="ram") as model:
        session = model.session(seed=1)
        session.append("a text" * 30)
        session.generate(max_new_tokens=40, ignore_eos=True)
        session.prefill()
        held = process_memory().anon_bytes
    return held, process_memory().anon_bytes  # with model and session closed, but known by name

used()
start = process_memory().anon_bytes
held, closed = zip(*[used() for _ in range(6)])
gc.collect()
print(start, max(held), max(closed), process_memory().anon_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' /proc")
def test_unloading_gives_the_memory_back(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(hidden_size=512, vocab_size=6000, graph_weights="fp32")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(artifact)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    start, held, closed, end = map(int, done.stdout.split())
    assert held - start > 20_000_000  # there was something to give back
    assert max(closed, end) - start < 0.3 * (held - start), (start, held, closed, end)


def test_no_module_of_the_core_keeps_state() -> None:
    """`global` statements, the usual way to have state in a module, are nowhere."""
    package = Path(edge_memllm.__file__).parent
    found = [
        f"{path.name}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if line.strip().startswith("global ")
    ]
    assert not found
