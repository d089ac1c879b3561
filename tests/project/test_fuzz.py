"""Some hundred changed artifacts, and a fuzzer that knows a fault when it sees one."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz import worker
from benchmarks.fuzz.artifact import Files, make_artifact, read_files, vouched
from benchmarks.fuzz.mutants import make_mutant
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.verification import verify_artifact
from edge_memllm.errors import ArtifactError

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
SEED = 20261130


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "artifact"
    make_artifact(folder)
    return folder


@pytest.fixture(scope="module")
def base(source: Path) -> Files:
    return read_files(source)


def test_the_artifact_that_is_changed_is_whole(source: Path, base: Files) -> None:
    with Artifact.open(source) as artifact:
        verify_artifact(artifact, lambda *_: None)
    assert vouched(base) == base
    assert sorted(base) == [
        "chat_template.jinja",
        "generation_config.json",
        "graph.onnx",
        "graph.onnx.data",
        "manifest.json",
        "table.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len(worker.answers(source)) == 3


def test_no_change_does_harm(source: Path, tmp_path: Path) -> None:
    found = list(fuzz.run(source, tmp_path, SEED, 0, 400))
    assert [line["number"] for line in found] == list(range(400))
    assert [line for line in found if fuzz.is_fault(line)] == []
    kinds = {(line["rewritten"], line["what"]) for line in found}
    assert {(True, "refused"), (True, "different"), (True, "same"), (False, "refused")} <= kinds


def test_a_number_makes_one_mutant(base: Files) -> None:
    mutants = [make_mutant(base, SEED, number) for number in range(200)]
    assert mutants == [make_mutant(base, SEED, number) for number in range(200)]
    assert {each.name for each in mutants} == set(base)
    assert sum(each.rewritten for each in mutants) in range(100, 180)
    words = {word for each in mutants for word in each.how.split("+")}
    assert {"flip", "json", "protobuf", "jinja", "numbers", "cut"} <= words


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ArtifactError("no"), "refused"),
        (ValueError("no"), "untyped"),
        (MemoryError(), "untyped"),
        (RecursionError(), "untyped"),
        (type("PanicException", (BaseException,), {})("no"), "untyped"),
    ],
)
def test_errors_are_told_apart(
    error: BaseException, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> list[str]:
        raise error

    monkeypatch.setattr(worker, "answers", fail)
    assert worker.outcome(Path(), [])[0] == what


def test_answers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "answers", lambda _: ["a", "b"])
    assert worker.outcome(Path(), ["a", "b"])[0] == "same"
    assert worker.outcome(Path(), ["a", "c"])[0] == "different"


WORKER = """
import os, sys, time
number = int(sys.argv[4])
print('{"ready": true}', flush=True)
print('{"number": %d, "what": "same"}' % number, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "what", "why"),
    [
        ("os.abort()", "crash", "exit status -6"),
        ("os._exit(3)", "crash", "exit status 3"),
        ("time.sleep(60)", "hang", "beyond 0.5 s"),
    ],
)
def test_a_process_that_ends_or_hangs_is_a_fault_and_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, what: str, why: str
) -> None:
    (tmp_path / "pretended.py").write_text(WORKER + end)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fuzz, "WORKER", "pretended")
    monkeypatch.setattr(fuzz, "_SECONDS", 0.5)
    found = list(fuzz.run(source, tmp_path, SEED, 7, 4))
    assert [(line["number"], line["what"]) for line in found] == [
        (7, "same"),
        (8, what),
        (9, "same"),
        (10, what),
    ]
    assert found[1]["why"] == why
    assert fuzz.is_fault(found[1])


def line(what: str, *, rewritten: bool) -> dict[str, Any]:
    return {"file": "f", "rewritten": rewritten, "what": what, "seconds": 0.1}


@pytest.mark.parametrize(
    ("what", "rewritten", "fault"),
    [
        ("same", False, False),
        ("refused", False, False),
        ("different", True, False),
        ("different", False, True),
        *((what, True, True) for what in fuzz.FAULTS),
    ],
)
def test_what_is_a_fault_is_printed_and_is_the_exit_status(
    what: str, rewritten: bool, fault: bool
) -> None:
    told = io.StringIO()
    with redirect_stdout(told):
        status = fuzz.report(iter([line(what, rewritten=rewritten)]))
    assert status == int(fault)
    first, *_, last = told.getvalue().splitlines()
    assert first.startswith("{") is fault
    assert last == f"1 mutants, {int(fault)} faults, 0.10 s at most for one"
    assert not fault or json.loads(first)["what"] == what


def test_one_mutant_can_be_kept(source: Path, tmp_path: Path) -> None:
    words = ["--artifact", str(source), "--seed", str(SEED), "--only", "3"]
    with redirect_stdout(io.StringIO()):
        assert fuzz.main([*words, "--keep", str(tmp_path / "kept")]) == 0
    kept = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    assert kept == make_mutant(read_files(source), SEED, 3).files
