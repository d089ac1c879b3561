"""Sweeps: what they measure, that they go on where they were, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
import edge_memllm_export
from edge_memllm.artifact.folder import Artifact
from edge_memllm.cli.analysis.sweep import short_names
from edge_memllm.cli.main import main
from edge_memllm.errors import ArtifactError, ExportError, RequestError
from edge_memllm.evaluation import measure_divergence, read_tasks
from edge_memllm.sweep import ResultsFolder, SweepRequest, load_results, run_sweep
from edge_memllm.sweep.measuring import measure_rows
from support.checkpoints import MakeArtifact, MakeCheckpoint

TEXT = "The quick brown fox jumps over the lazy dog. " * 2
PAIRS = '{"sentence_good": "a fox jumps", "sentence_bad": "a fox jump"}\n' * 2


@pytest.fixture
def source(make_artifact: MakeArtifact) -> Path:
    return make_artifact(table_codec="f16")


@pytest.fixture
def request_(source: Path, tmp_path: Path) -> SweepRequest:
    return SweepRequest(
        source, tmp_path / "sweep", ("int8", "int4"), texts={"fox": TEXT}, context=32, threads=1
    )


def by_codec(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["codec"]: each for each in summary["results"]}


def test_one_run_gives_every_figure(request_: SweepRequest, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(PAIRS)
    asked = replace(request_, codecs=("f16", "int8", "int4"), tasks=tuple(read_tasks([file])))
    done = run_sweep(asked)
    assert done.measured == ("f16", "int8-g64", "int4-g32")
    assert not done.failed
    found = by_codec(done.summary)
    assert list(found) == ["f16", "int8-g64", "int4-g32"]  # by size
    assert found["f16"]["rows"]["total"]["largest"] == 0
    assert found["f16"]["text"]["mean_kl"] == 0
    kl, rms = (
        [found[codec][part][name] for codec in found]
        for part, name in (("text", "mean_kl"), ("table", "bytes_per_token"))
    )
    assert kl == sorted(kl)
    assert rms == sorted(rms, reverse=True)
    assert found["int4-g32"]["table"]["bits_per_value"] == 4.5
    assert found["int4-g32"]["decode"]["tokens_per_second"] > 0
    assert 0 <= found["int8-g64"]["tasks"]["pairs"]["acc"] <= 1
    assert sorted(path.name for path in asked.out.iterdir()) == [
        *("report.html", "results", "results.csv", "results.json")
    ]
    assert load_results(asked.out) == done.summary


def test_figures_are_those_of_the_artifact(request_: SweepRequest) -> None:
    done = run_sweep(replace(request_, codecs=("int4",), keep=True))
    artifact = request_.out / "artifacts" / "int4-g32"
    with (
        edge_memllm.load(artifact, threads=1) as model,
        edge_memllm.load(request_.source, threads=1) as reference,
    ):
        expected = measure_divergence(model, reference, TEXT, context=32).as_dict()
    found = done.summary["results"][0]["text"]
    assert {name: found[name] for name in ("mean_kl", "perplexity_increase")} == {
        name: expected[name] for name in ("mean_kl", "perplexity_increase")
    }
    with Artifact.open(artifact) as opened:
        spec = opened.manifest.files["table.safetensors"]
    assert done.summary["results"][0]["table"]["file_bytes"] == spec.bytes


def test_row_errors_are_what_their_names_say(request_: SweepRequest) -> None:
    run_sweep(replace(request_, codecs=("int4",), keep=True))
    artifact = request_.out / "artifacts" / "int4-g32"
    with (
        edge_memllm.load(artifact, threads=1) as model,
        edge_memllm.load(request_.source, threads=1) as reference,
    ):
        ids = np.arange(model.manifest.model.vocab_size)
        counts = np.where(ids < 100, 5, 0)
        found = measure_rows(reference.table, model.table, len(ids), counts)
        truth, rows = reference.table.rows(ids), model.table.rows(ids)
    error = rows - truth
    layer = found.layers[1]
    assert layer.largest == np.abs(error[:, 1]).max()
    assert layer.rms == pytest.approx(np.sqrt((error[:, 1] ** 2).mean()), rel=1e-5)
    assert layer.relative_rms == pytest.approx(
        np.sqrt((error[:, 1] ** 2).sum() / (truth[:, 1] ** 2).sum()), rel=1e-5
    )
    norms = np.linalg.norm(rows[:, 1], axis=1) * np.linalg.norm(truth[:, 1], axis=1)
    cosine = (rows[:, 1] * truth[:, 1]).sum(axis=1) / norms
    assert layer.cosine == pytest.approx(cosine.mean(), abs=1e-6)
    assert found.total.rms == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert [(each.least, each.most, each.tokens) for each in found.classes] == [
        (0, 0, len(ids) - 100),
        (2, 9, 100),
    ]
    assert found.classes[1].rms == pytest.approx(np.sqrt((error[:100] ** 2).mean()), rel=1e-5)


class Page(HTMLParser):
    """Collects what a page would fetch, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_needs_nothing_else(request_: SweepRequest) -> None:
    run_sweep(replace(request_, texts={"<fox> & co": TEXT}))
    content = (request_.out / "report.html").read_text("utf-8")
    page = Page()
    page.feed(content)
    assert page.tags.count("svg") == 4
    assert not page.outside
    assert not {"script", "link", "img"} & set(page.tags)
    assert "url(" not in content
    assert "&lt;fox&gt; &amp; co" in content
    assert "prefers-color-scheme:dark" in content
    with (request_.out / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["codec"] for row in rows] == ["int8-g64", "int4-g32"]
    assert float(rows[0]["mean_kl"]) < float(rows[1]["mean_kl"])


def test_without_a_text_only_the_rows_are_judged(request_: SweepRequest) -> None:
    done = run_sweep(replace(request_, texts={}, context=None, codecs=("int8",)))
    assert done.summary["results"][0]["text"] is None
    assert done.summary["results"][0]["rows"]["classes"] == []
    assert (request_.out / "report.html").read_text("utf-8").count("<svg") == 1


# going on


def test_what_is_there_is_not_measured_again(request_: SweepRequest) -> None:
    first = run_sweep(replace(request_, codecs=("int8",)))
    again = run_sweep(request_)
    assert first.measured == again.skipped == ("int8-g64",)
    assert again.measured == ("int4-g32",)
    assert by_codec(again.summary)["int8-g64"] == by_codec(first.summary)["int8-g64"]


def test_other_settings_are_refused_or_measured_again(request_: SweepRequest) -> None:
    run_sweep(request_)
    other = replace(request_, codecs=("int8",), texts={"fox": TEXT + "And again."}, stride=8)
    with pytest.raises(RequestError, match=r"int8-g64 was measured with other settings \(texts, s"):
        run_sweep(other)
    again = run_sweep(replace(other, redo=True))
    assert again.measured == ("int8-g64",)
    assert list(by_codec(again.summary)) == ["int8-g64"]
    assert again.summary["left_out"] == ["int4-g32"]
    assert run_sweep(other).skipped == ("int8-g64",)


def test_a_killed_sweep_leaves_nothing_torn(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    out = tmp_path / "sweep"
    words = ("sweep", str(source), "--out", str(out), "--text", str(text), "--threads", "1")
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    command += ["--codecs", "int8,int4,int3,int2,nf4,fp8,bf16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("results/*.json")):
            assert process.poll() is None, "ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = set(ResultsFolder(out).all())  # every file there is whole
    assert "int8-g64" in done
    assert not (out / "results.json").exists()
    assert main([*words, "--codecs", "int8,int4", "--json"]) == 0
    assert not list(out.glob("artifacts/int4*"))
    assert {"int8-g64", "int4-g32"} <= set(by_codec(load_results(out)))


def test_a_sweep_is_alone_in_its_folder(request_: SweepRequest) -> None:
    with (
        ResultsFolder(request_.out).locked(),
        pytest.raises(RequestError, match="another sweep is writing there"),
    ):
        run_sweep(request_)


@pytest.mark.parametrize("content", ["{", "[]", '{"codec": "int8-g64"}'])
def test_a_damaged_result_is_named(request_: SweepRequest, content: str) -> None:
    file = request_.out / "results" / "int8-g64.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(ArtifactError, match=r"int8-g64\.json: not a result of a sweep"):
        run_sweep(request_)


# a checkpoint as the source


def test_a_checkpoint_is_exported_once(
    make_checkpoint: MakeCheckpoint, request_: SweepRequest
) -> None:
    asked = replace(request_, source=make_checkpoint(), codecs=("int8",))
    done = run_sweep(asked)
    assert done.summary["model"]["graph_weights"] == "int8"
    assert done.summary["model"]["source_codec"] == "f16"
    made = (request_.out / "reference" / "manifest.json").stat().st_mtime_ns
    assert run_sweep(asked).skipped == ("int8-g64",)
    assert (request_.out / "reference" / "manifest.json").stat().st_mtime_ns == made
    with pytest.raises(RequestError, match="has graph weights int8, int4 were asked for"):
        run_sweep(replace(asked, graph_weights="int4"))
    with pytest.raises(RequestError, match="was made from another checkpoint"):
        run_sweep(replace(asked, source=make_checkpoint(seed=5)))


# what cannot be


def test_a_codec_that_cannot_be_made_does_not_end_the_sweep(
    request_: SweepRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = edge_memllm_export.requantize

    def failing(artifact: Path, out: Path, *, table_codec: str, **options: Any) -> Any:
        if table_codec == "int8-g64":
            raise ExportError("too coarse for <this>")
        return real(artifact, out, table_codec=table_codec, **options)

    monkeypatch.setattr(edge_memllm_export, "requantize", failing)
    words = ("sweep", request_.source, "--out", request_.out, "--codecs", "int8,int4")
    assert main([*map(str, words)]) == 1
    shown = capsys.readouterr().out
    assert "could not be made: int8-g64: too coarse for <this>" in shown
    assert "int4-g32" in shown
    assert "too coarse for &lt;this&gt;" in (request_.out / "report.html").read_text("utf-8")
    monkeypatch.undo()
    assert run_sweep(replace(request_, texts={}, context=None, redo=True)).measured


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        (("int9",), "table codec 'int9', expected one of"),
        (("int8", "int8-g64"), "Codec int8-g64 is named twice"),
        (("int8-g128",), "width 64 is not a multiple of the group size 128"),
        (("none",), "codec none: stores no memory rows"),
        ((), "There is no codec to measure"),
    ],
)
def test_codecs_that_cannot_be(
    request_: SweepRequest, codecs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        run_sweep(replace(request_, codecs=codecs))


def test_sources_that_cannot_be(make_artifact: MakeArtifact, request_: SweepRequest) -> None:
    with pytest.raises(RequestError, match="stored as int8-g64: its error would be in every"):
        run_sweep(replace(request_, source=make_artifact(table_codec="int8")))
    with pytest.raises(RequestError, match="there is nothing to sweep"):
        run_sweep(replace(request_, source=make_artifact(beta=8)))
    with pytest.raises(RequestError, match="is an artifact: its graph stays as it is"):
        run_sweep(replace(request_, graph_weights="int4"))
    with pytest.raises(ArtifactError, match="does not exist, expected the folder"):
        run_sweep(replace(request_, source=request_.out / "nothing"))


# the command


def test_the_command_for_people_and_programs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ("sweep", source, "--out", tmp_path / "out", "--codecs", "int8", "--text", text)
    assert main([*map(str, words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["codec"] == "int8-g64"
    assert main([*map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "already measured: int8-g64" in shown
    assert "perplexity" in shown
    assert f"report: {tmp_path / 'out' / 'report.html'}" in shown


def test_options_without_effect_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(source), "--out", str(tmp_path / "out"), "--codecs", "int8"]
    assert main([*words, "--limit", "3"]) == 1
    assert "--limit has no effect without --task" in capsys.readouterr().err
    assert main([*words[:-1], "int8,,int4"]) == 2
    assert "'int8,,int4' has an empty name" in capsys.readouterr().err


def test_texts_are_named_by_what_tells_them_apart() -> None:
    assert short_names([Path("/a/x.txt"), Path("/b/y.txt")]) == ["x.txt", "y.txt"]
    assert short_names([Path("/a/b/x.txt"), Path("/c/b/x.txt"), Path("y")]) == [
        *("a/b/x.txt", "c/b/x.txt", "y")
    ]
    with pytest.raises(RequestError, match=r"x\.txt: the file is named twice"):
        short_names([Path("/a/x.txt"), Path("/a/b/../x.txt")])
