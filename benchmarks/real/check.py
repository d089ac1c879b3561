"""Whether a real model holds: exported, asked, asked by name, and compared with its float weights.

What ``make real`` runs. Every finding is printed; one that does not hold makes the exit status 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.prompts import MESSAGES, TEXTS
from benchmarks.real.quality import Judged, artifact_scores, judged
from benchmarks.real.reference import Reference, windows

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "export" / "edge_memllm_export" / "quality_text.txt"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
PERPLEXITY = 0.003  # most relative difference from the float weights
SECOND_START = 2.0  # seconds, what a later start should take at most
EXPORT_MEMORY = 1e9  # bytes, most beside the float weights
NEAR_TIE = 0.1  # nats between two tokens of the float weights that may change places
_SAMPLE_SECONDS = 0.01
_NEW_TOKENS = 32
_STARTS = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    holds: bool
    words: str


@dataclass(frozen=True)
class Ran:
    """What a command of the product did."""

    status: int
    output: str
    seconds: float
    own_bytes: int  # anonymous memory at its peak; 0 where that cannot be told


def check(gguf: Path, folder: Path, options: Sequence[str], threads: int) -> Iterator[Finding]:
    """Yield what is found with a GGUF file; artifacts go into `folder`.

    `options` are those of the export; with some, models by name are left out, for these have none.
    """
    artifact = folder / "artifact"
    exported = command(["export", str(gguf), str(artifact), "--overwrite", *options])
    yield Finding(exported.status == 0, f"exported in {exported.seconds:.0f} s")
    if exported.status:
        return
    yield answer(command(["run", str(artifact), "--greedy", "--prompt", QUESTION]), "artifact")
    if not options:
        yield from by_name(gguf, folder / "home")
    reference = Reference(gguf, threads)
    most = reference.bytes + EXPORT_MEMORY
    own = exported.own_bytes / 1e9
    words = f"memory of its own that the export took: {own:.2f} GB, at most {most / 1e9:.2f}"
    yield Finding(exported.own_bytes <= most, words)
    yield from compared(reference, artifact, threads)


def answer(ran: Ran, where: str) -> Finding:
    """Whether a greedy answer says what it should."""
    said = " ".join(ran.output.split())
    return Finding(ran.status == 0 and ANSWER in said, f"{where}, {QUESTION} {said!r}")


def by_name(gguf: Path, home: Path) -> Iterator[Finding]:
    """Ask the file itself, from an empty home: exported at the first start, there at the others."""
    shutil.rmtree(home, ignore_errors=True)
    words = ["run", str(gguf), "--greedy", "--prompt", QUESTION]
    first = command([*words, "--yes"], EDGE_MEMLLM_HOME=str(home))
    yield answer(first, f"by name, first start in {first.seconds:.0f} s")
    if first.status:
        return
    one = ["--max-new-tokens", "1"]
    later = [command([*words, *one], EDGE_MEMLLM_HOME=str(home)) for _ in range(_STARTS)]
    best = min(each.seconds for each in later)
    # How long it takes is told and not judged: a machine may be slow, or busy.
    slow = "" if best < SECOND_START else f", more than the {SECOND_START:.0f} s it should be"
    yield Finding(
        not any(each.status for each in later),
        f"by name, later start to the first token in {best:.2f} s{slow}",
    )


def compared(reference: Reference, artifact: Path, threads: int) -> Iterator[Finding]:
    """Perplexity and greedy tokens of an artifact against the float weights."""
    import edge_memllm

    with edge_memllm.load(artifact, device="cpu", threads=threads) as model:
        text = TEXT.read_text("utf-8")
        tokens = reference.tokens(text)
        same = model.tokenize(text) == tokens
        yield Finding(same, f"ids of {TEXT.name}, as the tokenizer of transformers gives them")
        ours = {"": artifact_scores(model)}
        found = judged(ours, reference.log_probabilities, windows(tokens))[""]
        yield Finding(abs(found.increase) <= PERPLEXITY, _words(found))
        prompts = [reference.message(each) for each in MESSAGES]
        prompts += [reference.tokens(each) for each in TEXTS]
        ties, wrong = [], []
        for prompt in prompts:
            for gap, words in differences(model, reference, prompt):
                (ties if gap <= NEAR_TIE else wrong).append(words)
    count = f"greedy tokens, {len(prompts)} prompts of {_NEW_TOKENS}"
    near = "".join(f"\n       near tie: {each}" for each in ties)
    far = "".join(f"\n       other token: {each}" for each in wrong)
    yield Finding(not wrong, f"{count}: {len(ties)} near ties, {len(wrong)} others{near}{far}")


def differences(
    model: Any, reference: Reference, prompt: Sequence[int]
) -> Iterator[tuple[float, str]]:
    """Yield where a model's greedy tokens are not the reference's: nats between both, and words.

    The reference scores what the model has written, in one pass: as long as each token is its
    likeliest, it would have written the same. Behind another one both go on from the reference's.
    """
    text, end = list(prompt), len(prompt) + _NEW_TOKENS
    while len(text) < end:
        text += _greedy(model, text, end - len(text))
        scores = reference.log_probabilities(text)
        likeliest = scores.argmax(1).tolist()
        others = (at for at in range(len(prompt), end) if text[at] != likeliest[at - 1])
        place = next(others, None)
        if place is None:
            return
        token, wanted = text[place], likeliest[place - 1]
        gap = float(scores[place - 1, wanted] - scores[place - 1, token])
        before = model.detokenize(text[:place])[-40:]
        pair = [model.detokenize([each]) for each in (wanted, token)]
        yield gap, f"{before!r}, {pair[0]!r} or {pair[1]!r}: {gap:.3f} nats"
        text = [*text[:place], wanted]


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    import edge_memllm

    pieces = model.stream(
        prompt, max_new_tokens=count, sampling=edge_memllm.Sampling(), seed=0, ignore_eos=True
    )
    return [piece.token for piece in pieces]


def _words(found: Judged) -> str:
    return (
        f"perplexity {found.perplexity:.4f}, float {found.reference:.4f}: "
        f"{100 * found.increase:+.3f} %, at most {100 * PERPLEXITY} % apart; "
        f"divergence {found.kl:.5f} nats; {found.tokens} tokens"
    )


def command(words: Sequence[str], **environment: str) -> Ran:
    """Run edge-memllm as installed beside this Python; what it says on stderr is passed on."""
    program = Path(sys.executable).with_name("edge-memllm")
    start = time.perf_counter()
    process = subprocess.Popen(
        [program, *words], stdout=subprocess.PIPE, text=True, env=_environment(environment)
    )
    assert process.stdout is not None
    own = _OwnMemory(process.pid)
    own.start()
    with process.stdout:
        output = process.stdout.read()
    own.ended.set()
    own.join()
    seconds = time.perf_counter() - start
    return Ran(process.wait(), output, seconds, own.peak)


class _OwnMemory(threading.Thread):
    """The most memory that a process has of its own: anonymous pages, not those of files."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.ended = threading.Event()
        self._status = Path(f"/proc/{pid}/status")

    def run(self) -> None:
        while not self.ended.wait(_SAMPLE_SECONDS):
            try:
                found = re.search(r"RssAnon:\s+(\d+) kB", self._status.read_text())
            except OSError:  # it has ended, or this is no Linux
                return
            self.peak = max(self.peak, 1024 * int(found[1]) if found else 0)


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", **changes}
