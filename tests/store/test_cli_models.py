"""Models by name on the command line: the question, ``list`` and ``remove``."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.cli.main import main
from edge_memllm.cli.options import add_options, options_of
from edge_memllm.cli.serve import ServeOptions, settings_of
from edge_memllm.store import Store
from support.small_model import open_small_model, write_small_artifact
from support.store import FakeExporter

Call = Callable[..., tuple[int, str, str]]
NAME = "my model"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def call(
    home: Path,
    exporter: FakeExporter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """``call(*words, typed=None) -> (exit code, stdout, stderr)``, at a terminal if typed to."""
    monkeypatch.setattr(edge_memllm, "load", lambda path, **_: open_small_model(path))

    def run(*words: object, typed: str | None = None) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            error = io.StringIO() if typed is None else Terminal()
            patch.setattr(sys, "stdin", io.StringIO() if typed is None else Terminal(typed))
            patch.setattr(sys, "stderr", error)
            code = main([*map(str, words)])
        return code, capsys.readouterr().out, error.getvalue()

    return run


def run(source: object, *words: str) -> list[object]:
    return ["run", source, "--prompt", "a", "--no-stats", "--max-new-tokens", "2", *words]


def test_without_a_terminal_it_says_how(call: Call, source: Path, exporter: FakeExporter) -> None:
    code, out, error = call(*run(source))
    assert code == 1
    assert out == ""
    assert f"{source}: is a checkpoint, not an exported model. Exporting it once" in error
    assert "takes about 10 s and 3,000 B: say --yes, or export it where you want it" in error
    assert f"edge-memllm export {source} OUT\n" in error
    assert exporter.made == []


def test_yes_asks_nothing_and_the_second_time_nothing_is_said(
    call: Call, source: Path, exporter: FakeExporter
) -> None:
    code, out, error = call(*run(source, "--yes"))
    assert code == 0
    assert error == (
        f"{source}: is a checkpoint, not an exported model. Exporting it into the cache: about "
        "10 s and 3,000 B.\n"
    )
    assert call(*run(source)) == (0, out, "")
    assert call(*run(NAME)) == (0, out, "")
    assert len(exporter.made) == 1


@pytest.mark.parametrize("typed", ["\n", "y\n", "what?\nYES\n"])
def test_at_a_terminal_it_asks(
    typed: str, call: Call, source: Path, exporter: FakeExporter
) -> None:
    code, _, error = call(*run(source), typed=typed)
    assert code == 0
    assert error.count("Exporting it once takes about 10 s and 3,000 B; go on? [Y/n] ") == len(
        typed.splitlines()
    )
    assert len(exporter.made) == 1


@pytest.mark.parametrize("typed", ["n\n", "No\n", ""])
def test_no_is_no(typed: str, call: Call, source: Path, exporter: FakeExporter) -> None:
    code, _, error = call(*run(source), typed=typed)
    assert code == 1
    assert "Nothing was exported. To choose how and where: edge-memllm export" in error
    assert exporter.made == []


def test_a_full_disk_is_told_before(
    call: Call, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    error = call(*run(source), typed="n\n")[2]
    assert "takes about 10 s and 3,000 B (1,000 B are free); go on?" in error


@pytest.mark.parametrize("command", ["serve", "eval", "bench"])
def test_other_commands_that_run_a_model_ask_as_well(
    command: str, call: Call, source: Path, home: Path
) -> None:
    (home / "text.txt").write_text("a text")
    words = {"serve": ["--port", 0], "eval": ["--text", "text.txt"], "bench": []}[command]
    code, _, error = call(command, source, *words)
    assert code == 1
    assert f"{source}: is a checkpoint, not an exported model." in error
    assert "say --yes" in error


def test_eval_measures_what_it_exports(
    call: Call, source: Path, home: Path, exporter: FakeExporter
) -> None:
    (home / "text.txt").write_text("a text")
    words = ["--text", "text.txt", "--context", 8, "--reference", source]
    assert call("eval", source, *words, "--yes")[0] == 0
    assert len(exporter.made) == 1


def test_list(call: Call, source: Path, home: Path) -> None:
    assert call("list")[1] == (
        f"no models in {home}/.cache/edge-memllm/models: 'edge-memllm run SOURCE' exports one\n"
    )
    assert json.loads(call("list", "--json")[1])["models"] == []
    call(*run(source, "--yes"))
    record = Store.of_user().entries()[0].folder / "entry.json"
    for seconds, shown in ((5, "just now"), (3700, "1 hour ago"), (200_000, "2 days ago")):
        os.utime(record, (0, record.stat().st_ctime - seconds))
        head, row = call("list")[1].splitlines()
        assert head.split() == ["name", "form", "size", "used", "source"]
        assert row.startswith(f"{NAME}  fp32, table int8-g32  ")
        assert row.endswith(f"{shown}  {source}")


def test_list_as_json(call: Call, source: Path) -> None:
    call(*run(source, "--yes"))
    killed = Store.of_user().folder / "other-01234567"
    killed.mkdir()
    models = json.loads(call("list", "--json")[1])["models"]
    made = Store.of_user().named(NAME)
    assert made is not None
    assert models[0]["name"] == NAME
    assert models[0]["complete"] is True
    assert models[0]["source"] == str(source)
    assert models[0]["path"] == str(made.artifact)
    assert models[0]["bytes"] == made.bytes
    assert models[0]["used"] >= models[0]["made"] > 0
    assert models[1] == {
        **dict.fromkeys(models[0]),
        "name": killed.name,
        "complete": False,
        "path": f"{killed}/artifact",
        "bytes": 0,
    }
    assert f"{killed.name}  incomplete" in call("list")[1]


def test_remove(call: Call, source: Path) -> None:
    other = source.with_name("other")
    other.mkdir()
    (other / "config.json").write_text("{}")
    for each in (source, other):
        call(*run(each, "--yes"))
    code, out, error = call("remove", NAME, "nobody", "--yes")
    assert code == 1
    assert error.endswith(
        "nobody: no model of that name is in the cache. There is: my model, other.\n"
    )
    assert "Say --yes where nobody can be asked" in call("remove", NAME)[2]
    assert "Nothing was removed" in call("remove", NAME, typed="n\n")[2]
    assert len(Store.of_user().entries()) == 2
    code, out, error = call("remove", NAME, typed="y\n")
    assert (code, error[:16]) == (0, "Remove my model ")
    assert out.startswith("removed my model: ")
    code, out, _ = call("remove", "--all", "--yes", "--json")
    assert json.loads(out)["removed"] == ["other"]
    assert call("remove", "--all", "--yes") == (0, "there was nothing to remove\n", "")
    assert source.is_dir()


def test_what_is_in_use_is_kept_and_the_rest_removed(call: Call, source: Path) -> None:
    call(*run(source, "--yes"))
    (Store.of_user().folder / "other-01234567").mkdir()
    entry = Store.of_user().named(NAME)
    assert entry is not None
    with Artifact.open(entry.artifact):
        code, out, error = call("remove", "--all", "--yes")
    assert code == 1
    assert out == "removed other-01234567: 0 B\n"
    assert f"error: {NAME}: in use by a process" in error
    assert Store.of_user().entries() == [entry]


@pytest.mark.parametrize("words", [[], ["a", "--all"]])
def test_what_to_remove_has_to_be_said(words: list[str], call: Call) -> None:
    assert "Give names that 'edge-memllm list' shows, or --all" in call("remove", *words)[2]


def test_an_artifact_needs_no_cache(call: Call, home: Path, exporter: FakeExporter) -> None:
    write_small_artifact(home / "artifact")
    assert call(*run("artifact"))[0] == 0
    assert exporter.made == []
    assert list(home.iterdir()) == [home / "artifact"]


def test_inspect_says_what_a_checkpoint_is(call: Call, source: Path) -> None:
    error = call("inspect", source)[2]
    assert "is a checkpoint, expected the folder of an exported model" in error
    assert "incomplete" not in error


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_gguf_file_is_called_one(command: str, call: Call, home: Path) -> None:
    (home / "m.gguf").write_bytes(b"GGUF")
    error = call(command, "m.gguf")[2]
    assert "m.gguf: is a GGUF file, expected the folder of an exported model" in error
    assert "edge-memllm export m.gguf OUT" in error


def test_serve_is_named_after_the_file(home: Path) -> None:
    def name(word: str) -> str:
        parser = argparse.ArgumentParser()
        add_options(parser, ServeOptions)
        return settings_of(options_of(ServeOptions, parser.parse_args([word]))).model_id

    assert name("some.Q8_0.gguf") == "some.Q8_0"
    assert name("org/name:Q8_0") == "org/name"


def test_a_name_is_inspected(
    call: Call,
    source: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call(*run(source), "--yes")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # where the source is no folder
    (name,) = Store.of_user().names()
    code, out, error = call("inspect", name)
    assert (code, error) == (0, "")
    assert "identity" in out
    code, _, error = call("inspect", "no such model")
    assert code == 1
    assert "no such model: does not exist" in error
