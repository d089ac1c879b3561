"""What is no artifact is exported once, into the user's cache, and found there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ArtifactError, ExportError, RequestError, StorageError
from edge_memllm.store import Entry, ExportPlan, Store, artifact_of, refuse
from edge_memllm.store import exporting as exporting_module
from support.checkpoints import MakeCheckpoint
from support.small_model import write_small_artifact
from support.store import FakeExporter

Get = Callable[..., Path]


def entries() -> list[Entry]:
    return Store.of_user().entries()


# --- what somebody names ---------------------------------------------------------------------


def test_an_artifact_is_taken_as_it_is(home: Path, get: Get, exporter: FakeExporter) -> None:
    write_small_artifact(home / "artifact")
    assert get("artifact") == Path("artifact")
    assert exporter.made == []
    assert not (home / ".cache").exists()


def test_a_checkpoint_is_exported_once(get: Get, source: Path, exporter: FakeExporter) -> None:
    made = get(source)
    assert get("my model") == get(f"{source}/") == made
    assert [path for path, _ in exporter.made] == [source]
    Artifact.open(made).close()


@pytest.mark.parametrize("named", ["model.gguf", "folder"])
def test_a_gguf_file_is_given_to_the_exporter(
    named: str, home: Path, get: Get, exporter: FakeExporter
) -> None:
    folder = home / "folder"
    folder.mkdir()
    for file in (home / "model.gguf", folder / "some.Q8_0.gguf", folder / "mmproj-some.gguf"):
        file.write_bytes(b"GGUF")
    get(named)
    wanted = home / "model.gguf" if named == "model.gguf" else folder / "some.Q8_0.gguf"
    assert [path for path, _ in exporter.made] == [wanted]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"folder: holds no model, expected .*manifest\.json.*config\.json.*\.gguf.*empty"),
        (["a.txt", "model.bin"], r"holds no model, .* It holds a\.txt, model\.bin\.$"),
        (["a.gguf", "b.gguf"], r"holds 2 GGUF files: a\.gguf, b\.gguf\. Name one of them"),
    ],
)
def test_a_folder_that_is_neither_says_what_it_holds(
    files: list[str], message: str, home: Path, get: Get
) -> None:
    (home / "folder").mkdir()
    for name in files:
        (home / "folder" / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=message):
        get("folder")


def test_what_is_not_there_is_told(home: Path, get: Get) -> None:
    with pytest.raises(ArtifactError, match=r"^nothing: does not exist, .*'edge-memllm list'"):
        get("nothing")
    (home / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r"notes\.txt: is a file, expected the folder of"):
        get("notes.txt")


def test_opening_a_checkpoint_as_an_artifact_says_what_it_is(source: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a checkpoint, .*edge-memllm export .* OUT$"):
        Artifact.open(source)


# --- once ------------------------------------------------------------------------------------


def test_without_leave_nothing_is_exported(source: Path, exporter: FakeExporter) -> None:
    with pytest.raises(ArtifactError, match=r"is a checkpoint, .*load\(\.\.\., export=True\)"):
        artifact_of(source, {}, refuse)
    assert exporter.made == []
    assert entries() == []


def test_what_an_export_will_cost_is_told_before(source: Path, exporter: FakeExporter) -> None:
    plans: list[ExportPlan] = []
    artifact_of(source, {}, plans.append)
    assert plans[0].seconds > 0
    assert plans[0].bytes == pytest.approx(5000 / 2 * 1.2)
    assert plans[0].free_bytes is not None
    assert not plans[0].changed


def change_size(source: Path) -> None:
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"more")


def change_time(source: Path) -> None:
    os.utime(source / "model.safetensors", ns=(1, 1))


def change_configuration_alone(source: Path) -> None:
    file = source / "config.json"
    before = file.stat()
    file.write_text(file.read_text().replace("llama", "llamb"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [change_size, change_time, change_configuration_alone])
def test_a_source_that_has_changed_is_exported_anew(
    change: Callable[[Path], None], get: Get, source: Path, exporter: FakeExporter
) -> None:
    made = get(source)
    change(source)
    with pytest.raises(ArtifactError, match=r"has changed since it was exported\. .*export=True"):
        artifact_of(source, {}, refuse)
    assert get(source) == made
    assert get(source) == made
    assert len(exporter.made) == 2
    assert len(entries()) == 1


def test_other_options_are_another_model(get: Get, source: Path, exporter: FakeExporter) -> None:
    first, second = get(source), get(source, graph_weights="int8")
    assert first != second
    assert get(source, graph_weights="int8") == second
    assert [options for _, options in exporter.made] == [
        {"keep_refused": False},
        {"graph_weights": "int8", "keep_refused": False},
    ]
    names = Store.of_user().names()
    assert sorted(names) == sorted(entry.folder.name for entry in names.values())
    source.rename(source.with_name("gone"))
    with pytest.raises(ArtifactError, match="does not exist"):  # for a name of two models
        get("my model")
    assert get(second.parent.name) == second


@pytest.mark.parametrize("name", ["out", "colour", "_", "progress"])
def test_an_option_that_there_is_not_is_refused(name: str, get: Get, source: Path) -> None:
    with pytest.raises(RequestError, match=f"export: '{name}' is no option of it, expected graph"):
        get(source, **{name: 1})


def test_another_version_of_the_format_is_exported_anew(
    get: Get, source: Path, exporter: FakeExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(source)
    monkeypatch.setattr(exporting_module, "FORMAT_VERSION", 99)
    get(source)
    assert len(exporter.made) == 2


def test_the_name_and_a_source_that_is_gone_lead_to_the_model(get: Get, source: Path) -> None:
    made = get(source)
    source.rename(source.with_name("elsewhere"))
    assert get("my model") == get(source) == made
    assert Store.of_user().named("my model") == entries()[0]


def test_what_is_used_remembers_when(get: Get, source: Path) -> None:
    get(source)
    os.utime(entries()[0].folder / "entry.json", (1, 1))
    before = time.time() - 60
    get(source)
    used = entries()[0].used
    assert used is not None
    assert used > before


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ExportError("Too bad."), ExportError, "Too bad. To export it with other options: edge-m"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StorageError, "No space left on device"),
    ],
)
def test_an_export_that_fails_leaves_nothing(
    error: Exception,
    expected: type[Exception],
    message: str,
    get: Get,
    source: Path,
    exporter: FakeExporter,
) -> None:
    exporter.fail = error
    with pytest.raises(expected, match=message):
        get(source)
    assert entries() == []
    exporter.fail = None
    get(source)


def test_a_cache_that_cannot_be_written_is_told(
    home: Path, get: Get, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("EDGE_MEMLLM_HOME", str(home / "file"))
    with pytest.raises(StorageError, match=r"file/models/.*cannot be written"):
        get(source)


_KILLED = """
import os, sys
from pathlib import Path
import edge_memllm_export
from edge_memllm.store import artifact_of

def die(source, out, **options):
    partial = Path(f"{out}.partial")
    partial.mkdir()
    (partial / "graph.onnx").write_bytes(b"half")
    os._exit(9)

edge_memllm_export.export_model = die
artifact_of(sys.argv[1], {}, lambda _: None)
"""


def test_a_killed_export_is_no_model(get: Get, source: Path) -> None:
    path = os.pathsep.join(each for each in sys.path if each)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", _KILLED, str(source)], env=environment, timeout=60)
    assert done.returncode == 9
    (left,) = entries()
    assert left.record is None
    assert left.bytes == len(b"half")
    with pytest.raises(ArtifactError, match="its export did not end"):
        get(left.folder.name)
    made = get(source)
    assert made == left.artifact
    Artifact.open(made).close()
    assert not made.with_name("artifact.partial").exists()


def test_a_killed_removal_is_no_model(get: Get, source: Path, exporter: FakeExporter) -> None:
    made = get(source)
    (made / "manifest.json").unlink()
    assert entries()[0].record is None
    assert get(source) == made
    Artifact.open(made).close()
    assert len(exporter.made) == 2


def test_two_at_once_export_once(
    source: Path, home: Path, exporter: FakeExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_memllm.store.store._POLL_SECONDS", 0.01)
    waiting, allowed = threading.Event(), []

    def permit(plan: ExportPlan) -> None:
        allowed.append(plan)
        assert waiting.wait(20)

    def told(stage: str, *_: Any) -> None:
        if stage == "waiting":
            waiting.set()

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(artifact_of(source, {}, permit, told)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(allowed) == len(exporter.made) == 1


# --- removing, and where it lies -------------------------------------------------------------


def test_what_is_in_use_is_not_removed(get: Get, source: Path) -> None:
    made = get(source)
    with Artifact.open(made):
        assert not entries()[0].remove()
        Artifact.open(made).close()
    assert entries()[0].remove()
    assert entries() == []


def test_what_is_being_exported_is_not_removed(get: Get, source: Path) -> None:
    get(source)
    with entries()[0].exporting(lambda *_: None):
        assert not entries()[0].remove()
    assert entries()[0].remove()


def test_where_models_lie(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder() -> Path:
        return Store.of_user().folder

    monkeypatch.setattr(sys, "platform", "linux")
    assert folder() == home / ".cache" / "edge-memllm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == home / ".cache" / "edge-memllm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    assert folder() == home / "caches" / "edge-memllm" / "models"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert folder() == home / "Library" / "Caches" / "edge-memllm" / "models"
    monkeypatch.setenv("EDGE_MEMLLM_HOME", "mine")
    assert folder() == home / "mine" / "models"


def test_nobody_has_no_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(RequestError, match=r"no home folder .* Set EDGE_MEMLLM_HOME"):
        Store.of_user()


# --- from end to end -------------------------------------------------------------------------


def test_load_exports_a_checkpoint_when_told_to(
    home: Path, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint()
    options = {"graph_weights": "fp32", "table_codec": "f32", "verify": False}
    stages: list[str] = []

    def told(stage: str, *_: int) -> None:
        stages.append(stage)

    with pytest.raises(ArtifactError, match=r"is a checkpoint, .*load\(\.\.\., export=True\)"):
        edge_memllm.load(checkpoint)
    with edge_memllm.load(
        checkpoint, threads=1, export=True, export_options=options, progress=told
    ) as model:
        text = model.generate("The river", max_new_tokens=4)
        assert not entries()[0].remove()
    assert stages.index("identity") < stages.index("files")
    with edge_memllm.load(checkpoint.name, threads=1) as model:
        assert model.generate("The river", max_new_tokens=4) == text


def test_options_of_an_export_that_is_not_wanted_are_refused(home: Path) -> None:
    with pytest.raises(RequestError, match="export_options are given, and export is not"):
        edge_memllm.load("anything", export_options={"graph_weights": "int8"})
