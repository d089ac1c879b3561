"""Copies llama.cpp's checks, exports models for them, runs them, and reads what came out."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.llama_server.edits import EDITS, NAMES, ORIGINS, STORIES, apply
from benchmarks.llama_server.selection import reason_against

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/llama-server.json"
CONTEXTS = (256, 512, 2048, 4096, 8192)
_MODEL = ROOT / "examples/tiny-english"
_CHECK_SECONDS = 900
_MOST_SAID = 200


@dataclass(frozen=True, slots=True)
class Check:
    """One check as pytest counts them, and what it said if it did not pass."""

    name: str
    outcome: str  # passed, failed or skipped
    said: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A run: the checks that apply, and how many others there are for each reason."""

    checks: tuple[Check, ...]
    others: dict[str, int]

    @property
    def passed(self) -> int:
        """How many of those that apply passed."""
        return sum(each.outcome == "passed" for each in self.checks)


def prepare(llama_cpp: Path, work: Path) -> None:
    """Make the folder of a run: edited checks, templates, and a model for each context."""
    tests = work / "tests"
    if tests.exists():
        shutil.rmtree(tests)
    shutil.copytree(llama_cpp / "tools/server/tests", tests)
    apply(tests / "unit")
    shutil.copytree(llama_cpp / "models/templates", work / "templates", dirs_exist_ok=True)
    for context in CONTEXTS:
        if not (work / f"models/{context}").exists():
            _export(context, work)


def _export(context: int, work: Path) -> None:
    """Export the small model for a longer context; its tokenizer begins texts, as theirs does."""
    checkpoint = work / "checkpoint"
    shutil.copytree(_MODEL, checkpoint, dirs_exist_ok=True)
    _rewrite(checkpoint / "config.json", max_position_embeddings=context)
    start = {"id": "<|endoftext|>", "type_id": 0}
    _rewrite(
        checkpoint / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"],
            "special_tokens": {
                start["id"]: {"id": start["id"], "ids": [0], "tokens": [start["id"]]}
            },
        },
    )
    (work / "models").mkdir(exist_ok=True)
    words = ["-m", "edge_memllm", "export", str(checkpoint), str(work / f"models/{context}")]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def _rewrite(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def run_checks(work: Path, only: str | None = None) -> Found:
    """Run all checks that apply, one after the other."""
    results, tests = work / "results.xml", work / "tests"
    words = ["-p", "benchmarks.llama_server.plugin", "-p", "no:cacheprovider", "-q", "unit"]
    words += [f"--junitxml={results}", f"--timeout={_CHECK_SECONDS}", "--tb=short"]
    paths = os.pathsep.join((str(ROOT), str(tests)))
    variables = {**os.environ, "PYTHONPATH": paths, "LLAMA_SERVER_WORK": str(work)}
    variables["PORT"] = str(_free_port())
    chosen = ["-k", only] if only else []
    command = [sys.executable, "-m", "pytest", *words]
    results.unlink(missing_ok=True)
    done = subprocess.run([*command, *chosen], cwd=tests, env=variables, check=False)
    if not results.exists():
        sys.exit(
            f"The checks did not run: pytest ended with {done.returncode}, as it says above. They "
            "import packages that edge-memllm does not need: docs/results/llama-server.md has them."
        )
    return Found(tuple(_checks(results)), _others(tests))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _checks(results: Path) -> Iterator[Check]:
    for case in ElementTree.parse(results).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        name = f"{file}.py::{case.get('name')}"
        wrong = next((each for kind in ("failure", "error") for each in case.iter(kind)), None)
        skipped = case.find("skipped")
        if wrong is not None:
            yield Check(name, "failed", _first_line(wrong.get("message", "")))
        elif skipped is not None:
            yield Check(name, "skipped", _first_line(skipped.get("message", "")))
        else:
            yield Check(name, "passed")


def _first_line(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text.partition("\n")[0])[:_MOST_SAID]


def _others(tests: Path) -> dict[str, int]:
    """Count, by their reasons, the checks that do not apply."""
    words = ["-m", "pytest", "unit", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = [_names(tests, *words, *more) for more in ((), ("-m", "slow"))]
    slow = set(found[1])
    reasons = (reason_against(each, slow=each in slow) for each in found[0])
    return dict(Counter(each for each in reasons if each is not None))


def _names(tests: Path, *words: str) -> list[str]:
    told = subprocess.run([sys.executable, *words], cwd=tests, capture_output=True, text=True)
    return [line for line in told.stdout.splitlines() if "::" in line]


def store(found: Found) -> None:
    """Store a run, with all that was edited for it."""
    told = {
        "environment": environment(("onnxruntime", "openai", "pytest")),
        "checks": [asdict(each) for each in found.checks],
        "others": found.others,
        "edits": [each._asdict() for each in EDITS],
        "stories": STORIES,
        "names": NAMES,
        "origins": ORIGINS,
    }
    RESULTS.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
