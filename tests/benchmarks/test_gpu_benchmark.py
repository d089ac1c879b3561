"""The one command for machines with CUDA says so where there is none, and reports what ran."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="gpu")


def test_without_cuda_nothing_is_run(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert script["main"]() == 1
    assert (
        "nothing to run: this onnxruntime has no CUDAExecutionProvider" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("tests", "bench", "code", "title"),
    [
        ("3 passed", 0, 0, "# CUDA: all passed"),
        ("2 passed, 1 skipped", 0, 1, "# CUDA: failed: Tests"),
        ("3 passed", 1, 1, "# CUDA: failed: cuda, cuda, recorded decode step, cpu"),
    ],
)
def test_one_report_tells_it_all(
    script: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tests: str,
    bench: int,
    code: int,
    title: str,
) -> None:
    ran: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        if "pytest" in command:
            return subprocess.CompletedProcess(command, 0, tests, "")
        if "bench" in command:
            return subprocess.CompletedProcess(command, bench, '{"decode": 1}', "it broke")
        return subprocess.CompletedProcess(command, 0, "a device", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    out = tmp_path / "report.md"
    monkeypatch.setattr("sys.argv", ["gpu.py", "artifact", "--out", str(out)])
    assert script["main"]() == code
    report = out.read_text()
    assert report.startswith(f"{title}\n")
    assert tests in report
    assert ("it broke" in report) == bool(bench)
    assert sum("--cuda-graph" in command for command in ran) == 1


def test_its_benchmark_commands_exist(script: dict[str, Any]) -> None:
    from edge_memllm.cli.main import build_parser

    for words in script["VARIANTS"].values():
        build_parser().parse_args(["bench", "artifact", *words, "--context", "128", "--json"])
