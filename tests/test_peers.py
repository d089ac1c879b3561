"""The scripts that compare peers: they say what they do without the peers being installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"
HEAVY = {"edge_memllm", "gguf", "llama_cpp", "onnxruntime", "onnxruntime_genai", "torch"}
# What an engine needs, when it is only looked at: numpy at most.
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))


def python(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)


def test_no_script_imports_a_peer_when_it_is_loaded() -> None:
    source = f"import sys, {', '.join(MODULES)}; print(*sys.modules)"
    done = python("-c", source)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize(
    ("script", "option"), [("compare.py", "--contender"), ("make_dense.py", "--shape")]
)
def test_help(script: str, option: str) -> None:
    done = python(script, "--help")
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_the_artifact_is_asked_for_before_anything_is_made(tmp_path: Path) -> None:
    done = python("compare.py", "--models", str(tmp_path / "models"))
    assert done.returncode == 2
    assert "--artifact is missing" in done.stderr
    assert not (tmp_path / "models").exists()


def test_an_unknown_contender_is_refused() -> None:
    done = python("compare.py", "--models", "x", "--contender", "gpt")
    assert done.returncode == 2
    assert "genai-128" in done.stderr


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts import each other by name, so their folder is where Python looks."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in MODULES:
            del sys.modules[name]


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


@pytest.mark.usefixtures("peers")
def test_ratios_are_medians_of_rounds() -> None:
    import page

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


@pytest.mark.usefixtures("peers")
def test_disturbed_runs_are_left_out() -> None:
    import page

    quiet, loud = run(1, 0.01), {**run(1, 0.5), "taken_by_others": 0.4}
    rounds = [dict.fromkeys(page.WORKLOADS, quiet), dict.fromkeys(page.WORKLOADS, loud)]
    found = page.summary(LOADED, rounds, rounds[:1] * 2, most=0.05)
    assert found["speeds"]["decode_128"]["median"] == pytest.approx(100)
    assert found["ours_against_it"]["decode_128"] == pytest.approx(1)
    assert found["disturbed_runs"] == len(page.WORKLOADS)
    nothing = page.summary(LOADED, rounds[1:], None, most=0.05)
    assert nothing["speeds"]["decode_128"] is None
    assert "| theirs | - | - | - |" in page.table({"llama-cpp": nothing}, {"llama-cpp": "theirs"})


@pytest.mark.usefixtures("peers")
def test_every_model_a_contender_runs_can_be_made() -> None:
    import contenders
    import make_dense

    all_of_them = {**contenders.CONTENDERS, **contenders.EXACT, "judge": contenders.JUDGE}
    for each in all_of_them.values():
        assert each.model is None or each.model in make_dense.TARGETS
        assert (FOLDER / f"{each.engine}.py").exists()
    for target in make_dense.TARGETS.values():
        assert set(target.needs) <= set(make_dense.TARGETS)


@pytest.mark.usefixtures("peers")
def test_what_is_made_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import make_dense

    def broken(folder: Path, out: Path, shape: str) -> None:
        out.write_text("half")
        raise OSError("disk full")

    monkeypatch.setitem(make_dense.TARGETS, "llama", make_dense.Target("llama", (), broken))
    with pytest.raises(OSError, match="disk full"):
        make_dense.ensure(tmp_path, "llama", "tiny")
    assert not make_dense.path_of(tmp_path, "llama").exists()


def test_a_worker_answers_runs_and_ends_with_its_input(tmp_path: Path) -> None:
    (tmp_path / "engine_fake.py").write_text(
        "class Engine:\n"
        "    def __init__(self, model, threads, context): print('noise')\n"
        "    def before_step(self): pass\n"
        "    def start(self, tokens, new_tokens): self.at = len(tokens); return self.at\n"
        "    def step(self): self.at += 1; return self.at\n"
        "    def finish(self): pass\n"
        "    def describe(self): return {'fake': True}\n"
    )
    specification = {"engine": "engine_fake", "model": "x", "threads": 1, "context": 9}
    words = ["worker.py", "fake", json.dumps({**specification, "settings": {}})]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=FOLDER,
        env={"PYTHONPATH": str(tmp_path)},
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
