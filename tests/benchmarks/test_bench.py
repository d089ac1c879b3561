"""bench, from the command line to its figures."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.benchmark import benchmark as measuring
from edge_memllm.benchmark.machine import DeviceProbe, MemoryBandwidth
from edge_memllm.cli.analysis import bench as synthetic
from edge_memllm.cli.analysis.bench_page import page
from edge_memllm.cli.main import main
from edge_memllm.errors import RuntimeUnavailableError
from support.checkpoints import CONTEXT, VOCABULARY, MakeArtifact

SIZES = ("--context", "20", "--new-tokens", "4", "--repeats", "2")
SHORT = ("--context", "5", "--new-tokens", "2", "--repeats", "1")


@pytest.fixture(autouse=True)
def small_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are not what is tested: a small array for the bandwidth is soon read."""
    monkeypatch.setattr(measuring, "MemoryBandwidth", lambda: MemoryBandwidth(1 << 20))


@pytest.fixture
def artifact(make_artifact: MakeArtifact) -> Path:
    return make_artifact()


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    """``report(*words)``: the JSON of a measurement that succeeds."""

    def call(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["bench", *map(str, words), "--json"]) == 0, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    return call


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that fails, and prints nothing else."""
    assert main(["bench", *map(str, words)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def record_bytes(artifact: Path) -> int:
    with Artifact.open(artifact) as opened:
        return opened.manifest.table.record_bytes


def test_every_state_of_the_cache_side_by_side(artifact: Path, report: Any) -> None:
    found = report(artifact, "--cache", "cold,warm", "--cache", "resident", *SIZES)
    names = [cell["name"] for cell in found["variants"]]
    assert names == ["cold", "warm", "resident"]
    assert found["identical"] is True
    assert found["identity"][0]["variants"] == names
    cold, warm, resident = found["variants"]
    for cell in found["variants"]:
        assert cell["table_bytes_read_per_token"] == record_bytes(artifact)
        assert cell["table_share_read"] >= 20 / VOCABULARY
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "peak_rss_bytes"):
            assert cell[key] > 0
        assert cell["step_seconds"]["median"] <= cell["step_seconds"]["most"]
    assert (cold["reader"], warm["reader"], resident["reader"]) == ("pread", "pread", "ram")
    assert (cold["reads_per_new_token"], resident["reads_per_new_token"]) == (1, 0)
    assert cold["to_resident"]["decode"]["ratio"] == pytest.approx(
        cold["decode_tokens_per_second"] / resident["decode_tokens_per_second"]
    )
    assert resident["to_resident"] is None
    assert warm["reading"] is None


def test_reading_past_the_page_cache_is_held_to_the_device(artifact: Path, report: Any) -> None:
    try:
        with Artifact.open(artifact) as opened, DeviceProbe(opened):
            pass
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))
    found = report(artifact, "--cache", "direct,resident", *SIZES)
    direct, resident = found["variants"]
    assert found["identical"] is True
    assert direct["reader"] == "direct"
    device = found["storage"][0]["records"]
    assert device["bytes_per_second"] == max(device["ways_bytes_per_second"].values())
    for ratio in (direct["reading"]["record_of_device"], direct["reading"]["rate_of_device"]):
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert resident["reading"] is None


def test_a_gpu_has_no_roofline_of_the_processor(artifact: Path, report: Any) -> None:
    found = report(artifact, *SHORT)
    for cell in (found, *found["variants"]):
        cell |= {"roofline": None, "device": "cuda"}
    found["memory_bandwidth"]["threads"] = {}
    found["storage"][0]["records"] = {"not_measured": "This system has no O_DIRECT."}
    shown = page(found)
    assert "share of the limit" not in shown
    assert "not counted on cuda" in shown
    assert "not measured: This system has no O_DIRECT." in shown


def test_the_names_that_other_programs_rely_on(artifact: Path, report: Any) -> None:
    found = report(artifact, *SIZES)
    for key in (
        "decode_tokens_per_second",
        "prefill_tokens_per_second",
        "time_to_first_token_seconds",
        "peak_rss_bytes",
        "rss_anon_bytes",
        "table_bytes_read_per_token",
        "reads_per_token",
    ):
        assert found[key] == found["variants"][0][key]
    assert found["cache"] == "warm"
    line = found["roofline"]
    moved = line["weight_bytes"] + line["kv_bytes"]
    assert line["limit_tokens_per_second"] == line["bandwidth_bytes_per_second"] / moved
    assert line["best_bandwidth_bytes_per_second"] >= line["bandwidth_bytes_per_second"]
    assert line["ratio"] > 0
    assert line["kv_bytes"] == 2 * 2 * 64 * 2 * (20 + 4 / 2)  # keys and values, layers, width
    assert {"processor", "physical_cores", "onnxruntime", "python"} <= found["environment"].keys()
    assert {"model", "driver", "file_system", "records"} <= found["storage"][0].keys()
    (bandwidth,) = found["memory_bandwidth"]["threads"].values()
    assert bandwidth["method"].startswith("numpy ")


def test_contexts_and_threads_are_lists(artifact: Path, report: Any) -> None:
    sizes = ("--context", "5,9", "--new-tokens", "2", "--repeats", "1")
    found = report(artifact, "--threads", "1,2", *sizes)
    cells = [(cell["context"], cell["name"], cell["threads"]) for cell in found["variants"]]
    assert cells == [
        (context, f"warm x{threads}", threads) for context in (5, 9) for threads in (1, 2)
    ]
    assert len(found["identity"]) == 2  # other threads, other rounding: not held to each other


def test_two_settings_of_one_artifact(artifact: Path, report: Any) -> None:
    words = ("--compare", "threads=1", f"{artifact}:threads=1,cache=cold")
    found = report(artifact, *words, *SIZES)
    (comparison,) = found["comparisons"]
    assert (comparison["name"], comparison["against"]) == ("A warm", "B cold")
    ratio = comparison["decode"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert ratio["text"].startswith(f"{ratio['ratio']:.2f}x (")
    assert found["compared"]["A"] == "threads=1"
    assert found["identical"] is True
    assert len(found["identity"]) == 1


def test_two_artifacts(artifact: Path, make_artifact: MakeArtifact, report: Any) -> None:
    other = make_artifact(beta=8)
    found = report("--compare", artifact, other, *SIZES)
    ours, dense = found["variants"]
    assert (ours["model"]["beta"], dense["model"]["beta"]) == (0, 8)
    assert dense["roofline"]["weight_bytes"] > ours["roofline"]["weight_bytes"]
    assert len(found["storage"]) == 2


def test_for_people(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(artifact), "--cache", "cold,resident", *SHORT]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "5 + 2 tokens" in shown.splitlines()[0]
    for name in ("decode", "prefill", "first token", "table", "memory", "measured", "storage"):
        assert f"{name}" in shown
    assert "outputs: identical, bit for bit, among cold, resident" in shown
    compare = ["bench", str(artifact), "--compare", "threads=1", "threads=2", *SHORT]
    assert main(compare) == 0
    shown = capsys.readouterr().out
    assert "A is threads=1\nB is threads=2\n" in shown
    assert "decode at 5: A warm / B warm = " in shown


def test_real_text_for_a_prompt(artifact: Path, tmp_path: Path, report: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 4, encoding="utf-8")
    found = report(artifact, "--prompt-file", text, *SIZES)
    assert found["prompts"] == "text"
    assert found["table_bytes_read_per_token"] < record_bytes(artifact)  # letters repeat


def test_outputs_that_differ_are_an_error(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = measuring.Worker.ask

    def unlike(worker: measuring.Worker, command: str, **values: Any) -> Any:
        reply = ask(worker, command, **values)
        return worker.variant.name if command == "fingerprint" else reply

    monkeypatch.setattr(measuring.Worker, "ask", unlike)
    assert main(["bench", str(artifact), "--cache", "cold,warm", *SHORT]) == 1
    shown = capsys.readouterr()
    assert "outputs: DIFFERENT among cold, warm" in shown.out
    assert "error: outputs that must be the same differ" in shown.err


def test_what_is_not_cold_is_not_called_so(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = measuring.Worker.ask

    def lukewarm(worker: measuring.Worker, command: str, **values: Any) -> Any:
        reply = ask(worker, command, **values)
        return reply | {"table_cached_share": 0.5} if command == "measure" else reply

    monkeypatch.setattr(measuring.Worker, "ask", lukewarm)
    assert main(["bench", str(artifact), "--cache", "cold", *SHORT]) == 0
    assert "cold: NOT COLD, 50% of the table stayed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give a MODEL, or --synthetic PRESET"),
        (["a", "--out", "b"], "--out and --beta are for --synthetic PRESET"),
        (["a", "--beta", "8"], "--out and --beta are for --synthetic PRESET"),
        (["a", "--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--synthetic", "tiny"], "--synthetic needs --out ARTIFACT"),
        (["a", "--synthetic", "tiny", "--out", "b"], "and no other ARTIFACT"),
        (["--synthetic", "tiny", "--out", "."], "exists already. Measure it"),
        (["a", "--reader", "uring"], "'uring' cannot be measured with --cache warm. cold: pread."),
        (["a", "--cache", "cold,warm", "--reader", "pread,mmap"], "beside the reader 'mmap'"),
        (["--compare", "threads=1", "threads=2"], "threads=1: names no artifact"),
        (["a", "--compare", "threads=x", "threads=2"], "threads=x: argument --threads: invalid"),
        (["a", "--compare", "speed=1", "threads=2"], "unrecognized arguments: --speed=1"),
        (
            ["a", "--cache", "cold,warm", "--compare", "cache=warm", "threads=1"],
            "A stands for 1 variants and B for 2",
        ),
    ],
)
def test_what_cannot_be_measured(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failing(capsys, *words)


def test_a_state_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "a", "--cache", "cold,tepid"]) == 2
    assert "'tepid' is none of cold, warm, direct, resident" in capsys.readouterr().err
    assert main(["bench", "a", "--context", "5,0"]) == 2
    assert "0 is not a positive number" in capsys.readouterr().err


def test_more_than_the_model_holds(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failing(capsys, artifact, "--context", VOCABULARY + 1, "--new-tokens", 2)
    assert f"{VOCABULARY + 1} distinct tokens was asked for, the vocabulary has" in message
    message = failing(capsys, artifact, "--context", 300, "--new-tokens", CONTEXT)
    assert f"300 prompt and {CONTEXT} new tokens were asked for" in message
    (tmp_path / "short.txt").write_text("Too short.")
    message = failing(capsys, artifact, "--prompt-file", tmp_path / "short.txt")
    assert "--prompt-file has 10 tokens, 128 were asked for" in message


def test_an_artifact_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in failing(capsys, tmp_path / "none")


def test_a_worker_that_cannot_load_says_why(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    with Artifact.open(copy) as opened:
        table = opened.manifest.table
    with (copy / table.file).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"damaged!")
    assert "sha256 of the checksums is" in failing(capsys, copy, *SHORT)


def test_synthetic_makes_a_checkpoint_and_exports_it(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Any
) -> None:
    steps: list[tuple[str, ...]] = []

    def step(*words: str) -> None:
        steps.append(words)
        if words[0] == "export":
            shutil.copytree(make_artifact(beta=8), words[2])

    monkeypatch.setattr(synthetic, "run_step", step)
    report("--synthetic", "tiny", "--beta", "8", "--out", tmp_path / "made", *SHORT)
    assert [words[0] for words in steps] == ["train", "export"]
    assert steps[0][3:5] == ("--beta", "8")
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


def test_a_step_that_fails_says_so(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = failing(capfd, "--synthetic", "huge", "--out", tmp_path / "made")
    assert "There is no preset 'huge'" in message
    assert "'edge-memllm train' ended with exit code 1" in message


@pytest.mark.parametrize(
    ("flags", "dtype"), [("fpu avx512_bf16 sse", "bfloat16"), ("fpu avx2", "float32")]
)
def test_rows_are_computed_in_what_is_fast(flags: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    assert synthetic._fast_dtype(tmp_path / "cpuinfo") == dtype
    assert synthetic._fast_dtype(tmp_path / "none") == "float32"
