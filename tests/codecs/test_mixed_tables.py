"""Tables in mixed precision: exported, requantised, swept; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.cli.main import main
from edge_memllm.codecs import get_codec
from edge_memllm.errors import ExportError, RequestError
from edge_memllm.mixed_precision import Target
from edge_memllm.mixed_precision.sensitivity import RowProbe, Sample, sample_windows, sensitivities
from edge_memllm.modeling.rows import NetworkRows
from edge_memllm.sweep import SweepRequest, run_sweep
from edge_memllm.table.table import Table
from edge_memllm_export import export_model, requantize
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_runtimes.torch_reference import TorchReference
from support.checkpoints import MakeArtifact, MakeCheckpoint, files_of

TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps. " * 8


def bits(path: Path) -> float:
    with Artifact.open(path) as artifact:
        layout, vocabulary = artifact.manifest.layout, artifact.manifest.model.vocab_size
    taken = Target(bits=1).taken(layout, vocabulary)
    return 8 * taken / (vocabulary * layout.layers * layout.width)


def test_requantize_fills_the_bits_and_says_what_they_cost(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    source = make_artifact(graph_weights="fp32", table_codec="f32")
    reports = [
        requantize(source, tmp_path / f"{number}", table_target=Target(bits=wanted))
        for number, wanted in enumerate((3.0, 5.0))
    ]
    for report, wanted in zip(reports, (3.0, 5.0), strict=True):
        assert 0.97 * wanted < bits(report.path) <= wanted
        assert report.manifest.table.codec.startswith("mixed-g")
        assert report.mixed is not None
        assert report.mixed.text == "the prose that comes along"
        # Additive errors are an approximation, and rough for so small a network.
        assert 0.25 < report.mixed.measured_kl / report.mixed.predicted_kl < 4
    coarse, fine = (report.mixed for report in reports)
    assert fine.measured_kl < coarse.measured_kl
    with edge_memllm.load(tmp_path / "0", threads=1) as model:
        assert len(model.tokenize(model.generate("The", max_new_tokens=4, seed=1))) > 0


def test_a_size_of_the_file_is_kept(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    source = make_artifact(table_codec="f16", num_hidden_layers=12)
    with pytest.raises(ExportError, match=r"target 10 bytes: .* Choose a target in between"):
        requantize(source, tmp_path / "out", table_target=Target(file_bytes=10))
    wanted = 220_000
    requantize(source, tmp_path / "out", table_target=Target(file_bytes=wanted), table_text=TEXT)
    assert 0.98 * wanted < (tmp_path / "out" / "table.safetensors").stat().st_size <= wanted


def test_an_export_climbs_the_ladder_and_is_the_same_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"table_target": Target(bits=4.5), "table_text": TEXT}
    report = export_model(checkpoint, tmp_path / "a", graph_weights="fp32", **options)
    assert report.mixed is not None
    assert report.mixed.text == "the table text"
    assert report.rungs[-1].ok
    assert 4.3 < bits(tmp_path / "a") <= 4.5
    export_model(checkpoint, tmp_path / "b", graph_weights="fp32", **options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("artifact", "options", "message"),
    [
        (
            {"table_codec": "int8"},
            {"table_target": Target(bits=4)},
            "stored as int8-g64: what each",
        ),
        ({"table_codec": "f16"}, {}, "table codec None, target None: expected one of the two"),
        (
            {"table_codec": "f16"},
            {"table_codec": "int8", "table_target": Target(bits=4)},
            "table codec int8, target 4 bits: expected one of the two",
        ),
        (
            {"table_codec": "f16"},
            {"table_target": Target(bits=4), "table_text": ""},
            "The table text has no tokens",
        ),
        (
            {"table_codec": "f16"},
            {"table_codec": "int8", "table_text": "x"},
            "table text: codec int8-g64 learns nothing from a text",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    artifact: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=message):
        requantize(make_artifact(**artifact), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_export_refuses_two_answers(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    target = Target(bits=4)
    with pytest.raises(ExportError, match="table codec int8, target 4 bits: expected one"):
        export_model(make_checkpoint(), tmp_path / "out", table_codec="int8", table_target=target)
    with pytest.raises(
        ExportError, match=r"target 4 bits, graph weights int8: .* without token memory \(dense\)"
    ):
        export_model(
            make_checkpoint(beta=8), tmp_path / "out", graph_weights="int8", table_target=target
        )


def test_a_text_that_counts_changes_what_is_learned(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    source = make_artifact(table_codec="f16")
    for name, text in (("a", None), ("b", "zzzz" * 500)):
        requantize(source, tmp_path / name, table_codec="codebook2", table_text=text)
    tables = [(tmp_path / name / "table.safetensors").read_bytes() for name in "ab"]
    assert tables[0] != tables[1]


def probe(path: Path) -> RowProbe:
    source = Checkpoint.open(path)
    network = source.architecture.reference().network
    config = network.config
    like = RecordLayout(
        config.num_hidden_layers, config.hidden_size, get_codec("int8-g32"), "float16"
    )
    rows, fed = (
        NetworkRows(network),
        replace(like, codec=get_codec("f32"), embedding_dtype="float32"),
    )
    windows = sample_windows(np.arange(100) % 40, config.vocab_size, like, 256)
    ids = np.unique(np.concatenate(windows))
    return RowProbe(
        TorchReference(network), fed, Sample(windows, ids, rows.embeddings(ids), rows.rows(ids))
    )


def test_sensitivity_is_of_each_layer_alone(checkpoint: Path) -> None:
    found = probe(checkpoint)
    true = found.sample.rows
    assert found.divergences(true, [slice(None)])[0] == pytest.approx(0, abs=1e-9)
    doubled = true.copy()
    doubled[:, 1] *= 2
    first, second = found.divergences(doubled, [slice(0, 1), slice(1, 2)])
    assert first == pytest.approx(0, abs=1e-9)
    assert second > 1e-6
    assert (sensitivities(found, lambda *_: None) > 0).all()


def test_windows_are_spread_over_a_text() -> None:
    like = RecordLayout(2, 64, get_codec("f16"), "float16")
    windows = sample_windows(np.arange(100_000), 300, like, 256)
    assert windows[0][0] == 0
    assert windows[-1][-1] == 99_999
    assert len({len(window) for window in windows}) == 1
    assert [each.tolist() for each in sample_windows(np.arange(9), 300, like, 8)] == [
        list(range(8))
    ]


def test_a_sweep_knows_targets(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    source = make_artifact(table_codec="f16")
    request = SweepRequest(
        source,
        tmp_path / "sweep",
        ("mixed-4.50", "int4"),
        texts={"fox": TEXT},
        context=32,
        threads=1,
        table_text=TEXT,
    )
    done = run_sweep(request)
    assert done.measured == ("mixed-4.5", "int4-g32")
    found = {each["codec"]: each for each in done.summary["results"]}
    assert 4.3 < found["mixed-4.5"]["table"]["bits_per_value"] <= 4.5
    assert found["int4-g32"]["table"]["bits_per_value"] == 4.5
    assert run_sweep(request).skipped == done.measured
    for word, message in (
        ("mixed-1", "mixed-1: target 1 bits"),
        ("mixed-", "table codec 'mixed-'"),
    ):
        with pytest.raises(RequestError, match=message):
            run_sweep(replace(request, codecs=(word,)))


def test_commands(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, text = make_artifact(table_codec="f16"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["requantize", str(source), str(out), "--bits", "4.5", "--table-text", str(text)]
    assert main(command) == 0
    assert "target: 4.5 bits" in capsys.readouterr().out
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mixed"]["target"] == "4.5 bits"
    for wrong in (["--bits", "0"], ["--bits", "4", "--target-size", "1MB"], []):
        assert main(["requantize", str(source), str(out), *wrong]) == 2
    with closing(Table.open(Artifact.open(out), "pread")) as table:
        assert np.isfinite(table.rows(np.arange(10))).all()


def test_requantising_so_loads_no_torch(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    source = make_artifact(table_codec="f16")
    code = (
        "import sys; from pathlib import Path; from edge_memllm_export import requantize; "
        "from edge_memllm.mixed_precision import Target; "
        f"requantize(Path({str(source)!r}), Path({str(tmp_path / 'out')!r}), "
        "table_target=Target(bits=4.5)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
