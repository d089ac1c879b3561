"""Do the peers compute the same network? A tiny one goes through all of them.

Unquantised forms must give the judge's logits and its greedy tokens; 4-bit forms must come near.
edge-memllm tells no logits: its unquantised form is held to the tokens, and both were compared with
the checkpoint by their export, or would not exist.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contenders import CONTENDERS, EXACT, JUDGE, OURS, Contender
from benchmarks.peers.models import ensure
from benchmarks.peers.worker import Worker

_THREADS = 2
_PROMPTS = (1, 17, 300)  # tokens; the last is longer than our chunks and a block of keys
_STEPS = 20
_VOCABULARY = 2048
_CONTEXT = 512
_EXACT_COSINE = 0.9999
_INT4_COSINE = 0.9  # random weights take 4 bits badly; a wrong layout of blocks gives about 0


def check(folder: Path) -> list[dict[str, Any]]:
    """One result per contender: cosines of its logits, tokens like the judge's, whether enough."""
    prompts = [random.Random(n).sample(range(1, _VOCABULARY), n) for n in _PROMPTS]
    reference = _answers(JUDGE, folder, prompts)
    results = []
    for contender in (*EXACT.values(), *CONTENDERS.values()):
        if contender.model is None or contender.name == OURS:
            continue
        answers = _answers(contender, folder, prompts)
        results.append(_compare(contender, answers, reference))
    return results


def page(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| runtime | first logits | last logits | greedy tokens | |", "|---|---|---|---|---|"]
    for each in results:
        cosines = (_shown(each["first_cosine"]), _shown(each["last_cosine"]))
        tokens = f"{each['equal_tokens']} of {each['tokens']}"
        verdict = "ok" if each["ok"] else "DIFFERS"
        lines.append(f"| {each['label']} | {' | '.join(cosines)} | {tokens} | {verdict} |")
    return "\n".join(lines)


def _shown(cosine: float | None) -> str:
    return "not told" if cosine is None else f"{cosine:.6f}"


def _answers(contender: Contender, folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    assert contender.model is not None
    model = ensure(folder, contender.model, "tiny")
    if contender.engine == "genai":
        contender = replace(contender, settings={**contender.settings, "keep_logits": True})
    answers = []
    with (
        tempfile.TemporaryDirectory() as place,
        Worker(contender, model, _THREADS, _CONTEXT) as worker,
    ):
        paths = {name: f"{place}/{name}.npy" for name in ("first_logits", "last_logits")}
        for prompt in prompts:
            answer = worker.run(prompt, _STEPS, **paths)
            for name, path in paths.items():
                answer[name] = np.load(path) if Path(path).exists() else None
            answers.append(answer)
    return answers


def _compare(
    contender: Contender, answers: list[dict[str, Any]], reference: list[dict[str, Any]]
) -> dict[str, Any]:
    """The worst cosine over the prompts; last logits only where the tokens before are equal."""
    pairs = list(zip(answers, reference, strict=True))
    equal = sum(_equal_tokens(ours["tokens"], theirs["tokens"]) for ours, theirs in pairs)
    total = len(pairs) * (_STEPS + 1)
    first = _worst([(a["first_logits"], b["first_logits"]) for a, b in pairs])
    same = [(a, b) for a, b in pairs if a["tokens"] == b["tokens"]]
    last = _worst([(a["last_logits"], b["last_logits"]) for a, b in same])
    exact = contender.name in EXACT
    bound = _EXACT_COSINE if exact else _INT4_COSINE
    near = all(cosine is None or cosine >= bound for cosine in (first, last))
    return {
        "name": contender.name,
        "label": contender.label,
        "first_cosine": first,
        "last_cosine": last,
        "equal_tokens": equal,
        "tokens": total,
        "ok": near and (equal == total if exact else True),
    }


def _equal_tokens(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    for count, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            return count
    return len(ours)


def _worst(pairs: list[tuple[Any, Any]]) -> float | None:
    cosines = [_cosine(a, b) for a, b in pairs if a is not None and b is not None]
    return min(cosines, default=None)


def _cosine(a: Any, b: Any) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
