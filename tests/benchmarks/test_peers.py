"""The scripts that compare peers: they say what they do without the peers being installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import contenders, engines, models, page
from support import ROOT

HEAVY = {"edge_memllm", "gguf", "llama_cpp", "onnxruntime", "onnxruntime_genai", "torch"}
# What an engine needs, when it is only looked at: numpy at most.
MODULES = sorted(path.stem for path in (ROOT / "benchmarks" / "peers").glob("*.py"))


def python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_no_script_imports_a_peer_when_it_is_loaded() -> None:
    names = ", ".join(f"benchmarks.peers.{name}" for name in MODULES)
    source = f"import sys, {names}; print(*sys.modules)"
    done = python("-c", source)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "option"),
    [("benchmarks.peers", "--contender"), ("benchmarks.peers.models", "--shape")],
)
def test_help(module: str, option: str) -> None:
    done = python("-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_the_artifact_is_asked_for_before_anything_is_made(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.peers", "--models", str(tmp_path / "models"))
    assert done.returncode == 2
    assert "--artifact is missing" in done.stderr
    assert not (tmp_path / "models").exists()


def test_an_unknown_contender_is_refused() -> None:
    done = python("-m", "benchmarks.peers", "--models", "x", "--contender", "gpt")
    assert done.returncode == 2
    assert "genai-128" in done.stderr


LOADED = {"peak_rss_bytes": 0, "anon_bytes": 0, "load_seconds": 1.0, "settings": {}}


def run(seconds: float, step: float) -> dict[str, Any]:
    return {
        "prefill_seconds": seconds,
        "step_seconds": [step] * 4,
        "peak_rss_bytes": 2_000_000_000,
        "anon_bytes": 1_000_000_000,
        "idle_cpu_seconds": 0.0,
        "taken_by_others": 0.01,
    }


def test_ratios_are_medians_of_rounds() -> None:
    ours = [dict.fromkeys(page.WORKLOADS, run(1, step)) for step in (0.01, 0.02, 0.04)]
    theirs = [dict.fromkeys(page.WORKLOADS, run(2, step)) for step in (0.03, 0.04, 0.08)]
    found = page.summary(LOADED, theirs, ours, most=0.05)
    assert found["speeds"]["decode_128"] == pytest.approx(
        {"median": 25, "least": 12.5, "most": 100 / 3}
    )
    assert found["speeds"]["prefill_512"]["median"] == pytest.approx(256)
    assert found["ours_against_it"] == pytest.approx(dict.fromkeys(page.WORKLOADS, 2))
    summaries = {"edge": page.summary(LOADED, ours, ours, most=0.05), "llama-cpp": found}
    labels = {"edge": "ours", "llama-cpp": "theirs"}
    assert "| theirs | 25.0 (12.5-33.3) |" in page.table(summaries, labels)
    assert page.ratios(summaries, labels).endswith("| theirs | 2.00 | 2.00 | 2.00 |")


def test_disturbed_runs_are_left_out() -> None:
    quiet, loud = run(1, 0.01), {**run(1, 0.5), "taken_by_others": 0.4}
    rounds = [dict.fromkeys(page.WORKLOADS, quiet), dict.fromkeys(page.WORKLOADS, loud)]
    found = page.summary(LOADED, rounds, rounds[:1] * 2, most=0.05)
    assert found["speeds"]["decode_128"]["median"] == pytest.approx(100)
    assert found["ours_against_it"]["decode_128"] == pytest.approx(1)
    assert found["disturbed_runs"] == len(page.WORKLOADS)
    nothing = page.summary(LOADED, rounds[1:], None, most=0.05)
    assert nothing["speeds"]["decode_128"] is None
    assert "| theirs | - | - | - |" in page.table({"llama-cpp": nothing}, {"llama-cpp": "theirs"})


def test_every_model_a_contender_runs_can_be_made() -> None:
    all_of_them = {**contenders.CONTENDERS, **contenders.EXACT, "judge": contenders.JUDGE}
    for each in all_of_them.values():
        assert each.model is None or each.model in models.TARGETS
        assert each.engine in engines.ENGINES
    for target in models.TARGETS.values():
        assert set(target.needs) <= set(models.TARGETS)


def test_what_is_made_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, out: Path, shape: str) -> None:
        out.write_text("half")
        raise OSError("disk full")

    monkeypatch.setitem(models.TARGETS, "llama", models.Target("llama", (), broken))
    with pytest.raises(OSError, match="disk full"):
        models.ensure(tmp_path, "llama", "tiny")
    assert not models.path_of(tmp_path, "llama").exists()


FAKE = """
from benchmarks.peers import engines, worker

class Fake(engines.Engine):
    def __init__(self, model, threads, context): print("noise")
    def start(self, tokens, new_tokens): self.at = len(tokens); return self.at
    def step(self): self.at += 1; return self.at
    def describe(self): return {"fake": True}

engines.ENGINES["fake"] = Fake
"""


def test_a_worker_answers_runs_and_ends_with_its_input() -> None:
    specification = {"engine": "fake", "model": "x", "threads": 1, "context": 9, "settings": {}}
    done = subprocess.run(
        [sys.executable, "-c", f"{FAKE}worker.main({json.dumps(specification)!r})"],
        cwd=ROOT,
        input=json.dumps({"prompt": [7, 8, 9], "steps": 2}) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, answer = map(json.loads, done.stdout.splitlines())
    assert loaded["settings"] == {"fake": True}
    assert answer["tokens"] == [3, 4, 5]
    assert len(answer["step_seconds"]) == 2
    assert "noise" in done.stderr


def test_a_worker_is_started_as_a_module() -> None:
    done = python("-m", "benchmarks.peers.worker", "name", json.dumps({"engine": "none"}))
    assert "KeyError: 'none'" in done.stderr
