"""The two benchmarks of reading work, on a tiny artifact; what they measure is not judged here."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import MakeArtifact
from small_artifact import write_artifact

FOLDER = Path(__file__).parents[1] / "benchmarks"
WORDS = "the cat and the dog and the bird "


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    code: int = module.main()
    return code


def test_hit_rates_of_a_text(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text(WORDS * 30, "utf-8")
    module = load("hit_rate", monkeypatch)
    options = [str(make_artifact()), "--text", str(tmp_path / "text")]
    options += ["--hot-text", str(tmp_path / "text")]
    assert run(module, monkeypatch, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    largest = found["rows"][-1]
    # All that is asked for fits into the largest cache, so each token misses once.
    expected = 1 - found["distinct_tokens"] / found["tokens"]
    for name in ("clock", "clock_hot", "lru", "lru_hot"):
        rates = [row[name] for row in found["rows"]]
        assert rates[-1] == pytest.approx(expected)
        assert rates[0] <= rates[-1]
    assert largest["records"] == round(0.5 * found["vocabulary"])
    assert run(module, monkeypatch, *options) == 0
    assert f"{expected:.3f}" in capsys.readouterr().out


def test_lru_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("hit_rate", monkeypatch)
    cache = module.LeastRecentlyUsed(4, [9, 8, 7])  # 9 and 8 stay, two places for the others
    asked = [9, 1, 2, 1, 3, 2, 1, 9, 8, 8]
    assert [cache.hits(token) for token in asked] == [
        *(False, False, False, True, False, False, False, True, False, True)
    ]


def test_read_rate_without_fio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = load("read_rate", monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert run(module, monkeypatch, str(tmp_path)) == 1
    assert "error: This compares with fio, which is not here" in capsys.readouterr().err


def rate_options(tmp_path: Path) -> list[str]:
    small = write_artifact(tmp_path / "artifact", vocab_size=200)
    return [str(small.path), "--rounds", "2", "--records", "90", "--singles", "20"]


def test_read_rate_against_a_fio_of_our_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = load("read_rate", monkeypatch)
    logs: list[list[str]] = []

    def run_fio(*options: str) -> dict[str, Any]:
        log = Path(options[0].removeprefix("--read_iolog=")).read_text("utf-8")
        logs.append([line.partition(" ")[2] for line in log.splitlines()])
        return {"bw_bytes": 1e3, "lat_ns": {"percentile": {"50.000000": 1, "99.000000": 2}}}

    monkeypatch.setattr(module, "run_fio", run_fio)
    monkeypatch.setattr(shutil, "which", lambda _: "fio")
    monkeypatch.setattr(module, "fio_version", lambda: "fio-0")
    options = rate_options(tmp_path)
    assert run(module, monkeypatch, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["batches"]) == {"64", "512"}
    for methods in (*found["batches"].values(), found["single"]):
        assert methods["fio"]["ratio"] == 1
        assert methods["pread"]["ratio"] > 1  # of a fio of 1,000 bytes a second and 1 ns
    assert {len(log) for log in logs} == {90 + 4, 20 + 4}
    for log in logs:
        offsets = [int(line.split()[1]) for line in log if line.startswith("read ")]
        assert len(set(offsets)) == len(offsets)
    assert run(module, monkeypatch, *options) == 0
    assert "goal 0.8: met by" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("fio"), reason="needs fio")
def test_read_rate_against_fio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = load("read_rate", monkeypatch)
    code = run(module, monkeypatch, *rate_options(tmp_path), "--json")
    printed = capsys.readouterr()
    if code and "fio failed" in printed.err:
        pytest.skip(printed.err)
    assert json.loads(printed.out)["batches"]["64"]["fio"]["bytes_per_second"] > 0


def test_more_records_than_the_table_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = load("read_rate", monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda _: "fio")
    options = rate_options(tmp_path)
    options[2] = "3"
    assert run(module, monkeypatch, *options) == 1
    assert "3 rounds of 90 distinct records were asked for, the table has 200" in (
        capsys.readouterr().err
    )


def test_fetching_tokens_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = load("token_fetch", monkeypatch)
    small = write_artifact(tmp_path / "artifact", vocab_size=200)
    options = [str(small.path), "--tokens", "300", "--record-cache", "20000"]
    assert run(module, monkeypatch, *options, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"auto: pread", "pread", "mmap"} <= {row["reader"] for row in rows}
    for row in rows:
        assert (row["cache_hit_rate"] > 0) == (row["record_cache_bytes"] > 0)
    assert run(module, monkeypatch, *options) == 0
    assert "auto: pread" in capsys.readouterr().out
    options[-1] = "3"
    assert run(module, monkeypatch, *options) == 0
    assert "left out: A record cache of 3 bytes" in capsys.readouterr().err
    assert run(module, monkeypatch, str(tmp_path / "none")) == 1
    assert "does not exist" in capsys.readouterr().err
