"""export, verify, inspect and demo, from the command line to their figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.cli import demo
from edge_memllm.cli.main import main
from edge_memllm.memory_plan import footprint
from support.checkpoints import CONTEXT, VOCABULARY, MakeArtifact, MakeCheckpoint

STAGE = re.compile(r"(identity|calibration|plan|graph|table|ladder|quality|answers): ")


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    """``report(*words)``: the JSON of a command that succeeds."""

    def call(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    return call


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that fails, and prints nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


# export and verify


def test_export_reports_every_rung(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, text: Path, report: Any
) -> None:
    words = ("--graph-weights", "fp32", "--table-codec", "f32", "--quality-text", text)
    found = report("export", make_checkpoint(), tmp_path / "out", *words)
    assert found["verified"] is True
    assert [rung["number"] for rung in found["rungs"]] == [1, 2, 3, 4, 5, 6]
    assert all(rung["ok"] for rung in found["rungs"])
    assert abs(found["quality"]["perplexity_increase"]) < 1e-3
    assert found["manifest"]["table"]["codec"] == "f32"
    verified = report("verify", tmp_path / "out", "--against", make_checkpoint())
    assert verified["ok"] is True
    assert verified["records"] == VOCABULARY
    assert len(verified["rungs"]) == 6


def test_export_for_people(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(make_checkpoint()), str(out), "--no-verify"]) == 0
    shown = capsys.readouterr().out
    assert "int8-g64" in shown
    assert "NOT VERIFIED: nothing was compared with the checkpoint" in shown
    assert "exists already" in failing(capsys, "export", make_checkpoint(), out, "--no-verify")
    again = ["export", str(make_checkpoint()), str(out), "--no-verify", "--overwrite"]
    assert main(again) == 0


def test_export_with_a_quality_text_that_is_none(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(b"abc\xff")
    words = (make_checkpoint(), tmp_path / "out", "--quality-text", tmp_path / "image")
    assert "image: byte 3 is not UTF-8 text" in failing(capsys, "export", *words)


def test_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in failing(capsys, "export", tmp_path / "no", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_shows_the_ladder(
    artifact: Path, make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(artifact), "--against", str(make_checkpoint())]) == 0
    shown = capsys.readouterr().out
    assert f"{VOCABULARY} records; graph and table belong to sha256:" in shown
    assert shown.count("\nok ") == 6


def test_a_red_rung_is_exit_code_1(
    artifact: Path,
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edge_memllm_export.judging import ladder

    monkeypatch.setattr(ladder, "_GRAPH_KL_BOUNDS", {})
    words = ["verify", str(artifact), "--against", str(make_checkpoint())]
    assert main(words) == 1
    assert "FAILED  4 graph" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_verify_finds_what_no_generation_would_read(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with Artifact.open(copy) as opened:
        table = opened.manifest.table
    with (copy / table.file).open("r+b") as file:
        file.seek(table.records_offset + 250 * table.stride)
        file.write(b"damage")
    assert "sha256" in failing(capsys, "verify", copy)


# inspect


def test_inspect_tells_shape_sizes_and_needs(artifact: Path, report: Any) -> None:
    found = report("inspect", artifact, "--tokens", 100)
    with Artifact.open(artifact) as opened:
        manifest = opened.manifest
    assert found["model"]["vocab_size"] == VOCABULARY
    assert found["parameters"]["attention"] == 2 * 4 * 64 * 64
    assert found["parameters"]["table_values"] == VOCABULARY * 2 * 64
    needs = found["needs"]
    assert needs["disk_bytes"] == sum((artifact / name).stat().st_size for name in manifest.files)
    assert needs["kv_bytes"] == 2 * 2 * 64 * 256 * 2  # keys and values, grown to 256, float16
    assert needs["record_bytes"] == manifest.table.record_bytes
    records = VOCABULARY * manifest.table.stride
    assert needs["resident_bytes_with_table"] - needs["resident_bytes"] == records
    assert footprint(manifest, 100).kv_bytes < footprint(manifest, CONTEXT).kv_bytes


@pytest.mark.parametrize(
    ("beta", "words"),
    [
        (0, "memoryllm, beta 0: the table holds a row for each layer"),
        (3, "memoryllm, beta 3: the table holds a row for each layer"),
        (8, "memoryllm, beta 8: without token memory (dense), the table holds embeddings only"),
    ],
)
def test_inspect_names_the_family(
    beta: int, words: str, make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(make_artifact(beta=beta))]) == 0
    shown = capsys.readouterr().out
    assert words in shown
    assert ("feed-forward about" in shown) == (beta > 0)


def test_inspect_reads_the_manifest_alone(artifact: Path, tmp_path: Path, report: Any) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(artifact / "manifest.json", copy)
    assert report("inspect", copy) == report("inspect", artifact)


def test_inspect_beyond_the_context(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, "inspect", artifact, "--tokens", CONTEXT + 1)
    assert f"--tokens is {CONTEXT + 1}, the model's context holds {CONTEXT}" in message


# demo


def test_demo_reads_one_record_per_generated_token(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "_NEW_TOKENS", 12)
    words = ["demo", "--checkpoint", str(make_checkpoint()), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "bytes: exactly one record" in shown
    for prompt in demo.PROMPTS:
        assert prompt in shown
    assert f"edge-memllm run {tmp_path / 'out'}" in shown


def test_demo_tells_nothing_else(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    words = ["demo", "--checkpoint", str(make_checkpoint()), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "edge_memllm.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # No warning of ours or of a library; how far it is, where it takes long.
    told = [line for line in done.stderr.splitlines() if not STAGE.match(line)]
    assert (done.returncode, told) == (0, [])


def test_demo_without_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, "demo", "--checkpoint", tmp_path)
    assert "holds no checkpoint. The demo's model comes with the repository" in message
