"""Repacked weights between loads: made once, checked before use, never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import edge_memllm
from edge_memllm import loading, memory_plan
from edge_memllm.artifact.atomic import FolderLock
from edge_memllm.artifact.folder import Artifact
from edge_memllm.cli.main import main
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError, EdgeMemLLMError, RequestError
from edge_memllm.progress import PACKING
from edge_memllm.store import store
from edge_memllm_runtimes import ort
from edge_memllm_runtimes import packed_weights as packed_cache
from edge_memllm_runtimes.cpu_graph import for_cpu
from edge_memllm_runtimes.graph_file import read_graph
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.own_kernels import installed_kernels
from edge_memllm_runtimes.packed_weights import packed_graph, processor_kind
from edge_memllm_runtimes.runtime import open_runtime
from support.checkpoints import MakeArtifact, files_of
from support.runtimes import ARTIFACTS

# Every matrix takes more than a megabyte when repacked: o_proj and head are the smallest.
LARGE = {
    "hidden_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "vocab_size": 2048,
    "memory_intermediate_size": 64,
}


@pytest.fixture(scope="module")
def shared(make_artifact: MakeArtifact) -> Path:
    return make_artifact(**ARTIFACTS["int4"], **LARGE)


@pytest.fixture
def artifact(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "artifact"))


def text_of(artifact: Path, prompt: str = "packed", **options: Any) -> str:
    with edge_memllm.load(artifact, device="cpu", threads=1, **options) as model:
        return model.generate(prompt, max_new_tokens=12, ignore_eos=True)


def made(cache: Path) -> Path:
    (place,) = cache.iterdir()
    return place


@pytest.fixture(scope="module")
def filled(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "deep" / "cache"
    text_of(shared, packed_cache=folder)
    return folder


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A cache that was filled by one load, to be changed at will."""
    return Path(shutil.copytree(filled, tmp_path / "filled"))


def test_it_is_made_once_and_gives_the_same_text(
    artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = files_of(artifact)
    expected = text_of(artifact)
    cache = tmp_path / "cache"
    with caplog.at_level(logging.INFO):
        assert text_of(artifact, packed_cache=cache) == expected
        assert "packed weights made in" in caplog.text
        caplog.clear()
        assert text_of(artifact, packed_cache=str(cache)) == expected
        assert "packed weights made" not in caplog.text
    assert sorted(files_of(made(cache))) == ["graph.onnx", "graph.onnx.data", "packed.json"]
    assert files_of(artifact) == before


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--prompt", "packed", "--max-new-tokens", "2"],
        ["bench", "--context", "4", "--new-tokens", "2", "--repeats", "1"],
    ],
    ids=lambda words: words[0],
)
def test_who_waits_for_it_is_told_why_once(
    command: list[str], artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    asked = [name, str(artifact), *options, "--packed-cache", str(tmp_path / "cache")]
    said = []
    for _ in range(2):
        assert main([*asked, "--threads", "1", "--device", "cpu"]) == 0
        said.append(capfd.readouterr().err.count(f"{PACKING}: ...\n"))
    assert said == [1, 0]


def change_data(place: Path) -> None:
    file = place / "graph.onnx.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_data(place: Path) -> None:
    file = place / "graph.onnx.data"
    file.write_bytes(file.read_bytes()[:-1])


def remove_data(place: Path) -> None:
    (place / "graph.onnx.data").unlink()


def link_data(place: Path) -> None:
    file = place / "graph.onnx.data"
    file.rename(place.parent / "elsewhere")
    file.symlink_to(place.parent / "elsewhere")


def forget_record(place: Path) -> None:
    (place / "packed.json").unlink()


def spoil_record(place: Path) -> None:
    (place / "packed.json").write_text("{")


def of_another_library(place: Path) -> None:
    record = json.loads((place / "packed.json").read_text())
    record["facts"]["onnxruntime"] = "0.1"
    (place / "packed.json").write_text(json.dumps(record))


def without_the_graph(place: Path) -> None:
    record = json.loads((place / "packed.json").read_text())
    del record["files"]["graph.onnx"]
    (place / "packed.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change_data, "graph.onnx.data: its content is not what was written"),
        (cut_data, "its content is not what was written"),
        (remove_data, "graph.onnx.data: the file is missing"),
        (link_data, "is a symbolic link"),
        (forget_record, "packed.json: the file is missing"),
        (spoil_record, "packed.json: not valid JSON"),
        (of_another_library, "made for another graph, library or processor"),
        (without_the_graph, "graph.onnx: its content is not what was written"),
    ],
)
def test_damage_is_found_and_mended_with_a_warning(
    artifact: Path,
    cache: Path,
    damage: Callable[[Path], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (place,) = cache.iterdir()
    damage(place)
    assert text_of(artifact, packed_cache=cache) == text_of(artifact)
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "packed weights are made again" in warnings[0]
    assert reason in warnings[0]
    caplog.clear()
    text_of(artifact, packed_cache=cache)
    assert not caplog.records


def test_another_processor_or_library_gets_its_own(
    artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "processor_kind", lambda: "another")
    text_of(artifact, packed_cache=cache)
    assert len(list(cache.iterdir())) == 2


def test_the_kind_of_a_processor_is_its_instruction_sets(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags: avx2 avx512f\ncpu MHz: 2400\n")
    first = processor_kind(info)
    info.write_text("processor: 0\nflags: avx2 avx512f\ncpu MHz: 1200\n")
    assert processor_kind(info) == first
    info.write_text("processor: 0\nflags: avx2\ncpu MHz: 1200\n")
    assert processor_kind(info) != first
    assert processor_kind(tmp_path / "not there") != first


def test_the_branches_of_int8_keys_and_values_are_kept_too(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact(**ARTIFACTS["int4"], **LARGE, kv_dtype="int8")
    expected = text_of(artifact, prompt="packed " * 30)  # long enough for the other branch
    for _ in range(2):
        found = text_of(artifact, prompt="packed " * 30, packed_cache=tmp_path / "cache")
        assert found == expected
    assert made(tmp_path / "cache")


def test_small_matrices_come_back_right_or_are_refused(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    small, cache = make_artifact(**ARTIFACTS["int4"]), tmp_path / "cache"
    if onnxruntime.__version__.startswith("1.31."):
        with pytest.raises(RequestError, match=r"as 1\.31 does with those below 1 MB"):
            text_of(small, packed_cache=cache)
        assert not list(cache.iterdir())
    else:
        found = logits_of(small, packed_cache=cache)
        np.testing.assert_array_equal(found, logits_of(small))


@pytest.mark.parametrize("offsets", [[], [4096, 4128], [65]])
def test_offsets_that_would_be_misread_are_refused(offsets: list[int]) -> None:
    packed_cache._check_alignment([64, 4096, 1 << 20])
    with pytest.raises(RequestError, match="packed_cache cannot hold this graph"):
        packed_cache._check_alignment(offsets)


def test_a_form_that_the_library_never_wrote_before_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ArtifactError("another form.")

    monkeypatch.setattr(packed_cache, "check_graph_file", refuse)
    with pytest.raises(RequestError, match=r"wrote it in a form that is not known here \(another"):
        text_of(artifact, packed_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_logits_are_the_same_to_the_bit(artifact: Path, cache: Path) -> None:
    found = [logits_of(artifact), logits_of(artifact, packed_cache=cache)]
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[1], found[0])


def logits_of(artifact: Path, **options: Any) -> np.ndarray:
    with (
        edge_memllm.load(artifact, device="cpu", threads=1, **options) as model,
        Feeder(model.runtime, model.table, 1, 8) as feeder,
    ):
        parts = [feeder.prefill(0, range(20)).copy()]
        parts += [feeder.decode([token])[0].copy() for token in (7, 9)]
    return np.stack(parts)


def test_float_weights_are_not_repacked(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match="packed_cache is for graphs with int2, int4, int8, mixed weights"
    ):
        text_of(make_artifact(**ARTIFACTS["fp32"]), packed_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("inside", [".", "cache", "deep/cache"])
def test_a_folder_inside_the_artifact_is_refused(artifact: Path, inside: str) -> None:
    before = files_of(artifact)
    with pytest.raises(RequestError, match="inside the artifact, whose files are not to change"):
        text_of(artifact, packed_cache=artifact / inside)
    assert files_of(artifact) == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_a_folder_whose_name_is_not_utf_8_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"packed_cache is '.*caf\\udce9': ONNX Runtime opens"):
        text_of(artifact, packed_cache=os.path.join(tmp_path, os.fsdecode(b"caf\xe9")))
    assert list(tmp_path.iterdir()) == [artifact]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such locale")
def test_a_name_that_the_locale_cannot_spell_is_opened(artifact: Path, tmp_path: Path) -> None:
    """In the C locale, UTF-8 in a path is not text to Python."""
    cache, moved = tmp_path / "größe", artifact.rename(tmp_path / "modèle")
    command = [
        sys.executable,
        "-m",
        "edge_memllm.cli.main",
        "run",
        str(moved),
        "--prompt",
        "packed",
    ]
    command += ["--max-new-tokens", "4", "--greedy", "--json", "--packed-cache", str(cache)]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    made = []
    for more in (plain, {}):
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, check=True)
        made.append(json.loads(done.stdout)["text"])
    assert made[0] == made[1]
    assert cache.is_dir()


def test_a_folder_that_cannot_be_made_is_one_error(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeMemLLMError, match=r"file: the packed weights cannot be written"):
        text_of(artifact, packed_cache=tmp_path / "file")


def test_too_little_space_is_told_before_anything_is_written(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(EdgeMemLLMError, match=r"need [\d,]+ bytes, 1,000 are free"):
        text_of(artifact, packed_cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_failure_leaves_nothing_and_old_leftovers_go(artifact: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def fail(stored: Path, folder: Path) -> None:
        assert stored.read_bytes() == for_cpu((artifact / "graph.onnx").read_bytes()).content
        (folder / "graph.onnx").write_text("half")
        raise OSError(28, "No space left on device")

    with Artifact.open(artifact) as opened:
        with pytest.raises(EdgeMemLLMError, match=r"cannot be written \(No space left on device\)"):
            packed_graph(cache, opened, "1", fail)
        assert not list(cache.iterdir())
        text_of(artifact, packed_cache=cache)
        (place,) = cache.iterdir()
        left, alive = (cache / f".edge-memllm-{word}.partial" for word in ("0123abcd", "4567abcd"))
        for folder in (left, alive):
            folder.mkdir()
        forget_record(place)
        with closing(FolderLock(alive)):
            text_of(artifact, packed_cache=cache)
        assert sorted(cache.iterdir()) == sorted([place, alive])


def test_who_comes_second_takes_what_is_there(
    artifact: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place,) = cache.iterdir()
    aside = tmp_path / "aside"
    place.rename(aside)

    def meanwhile(_: Path, folder: Path) -> None:
        shutil.copytree(aside, place)
        for file in aside.iterdir():
            shutil.copy(file, folder)

    with Artifact.open(artifact) as opened, caplog.at_level(logging.INFO):
        found = packed_graph(
            cache,
            opened,
            onnxruntime.__version__,
            meanwhile,
            kernels=installed_kernels(),
        )
    assert found == place / "graph.onnx"
    assert "made by another process meanwhile" in caplog.text
    assert list(cache.iterdir()) == [place]


def test_a_graph_of_another_model_in_the_cache_is_made_again(
    artifact: Path, cache: Path, make_artifact: MakeArtifact, caplog: pytest.LogCaptureFixture
) -> None:
    (place,) = cache.iterdir()
    other = make_artifact(**ARTIFACTS["int4"], **LARGE, seed=1) / "graph.onnx"
    shutil.copy(other, place / "graph.onnx")
    record = json.loads((place / "packed.json").read_text())
    file = os.open(place / "graph.onnx", os.O_RDONLY)
    record["files"]["graph.onnx"] = packed_cache._digest(file)
    (place / "packed.json").write_text(json.dumps(record))
    assert text_of(artifact, packed_cache=cache) == text_of(artifact)
    assert "graph and manifest are of different models" in caplog.text


def test_packed_weights_the_library_cannot_load_are_named(
    artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place,) = cache.iterdir()
    (place / "graph.onnx.data").write_bytes(b"")
    monkeypatch.setattr(packed_cache, "_check_file", lambda *_: None)
    with pytest.raises(
        EdgeMemLLMError, match=r"the packed weights cannot be used: .* Delete this folder"
    ):
        text_of(artifact, packed_cache=cache)


# --- where nobody asked -------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, and every graph counts as large."""
    monkeypatch.setattr(memory_plan, "_PACKED_FROM", 0)
    monkeypatch.setenv("EDGE_MEMLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def loaded(artifact: Path, **options: Any) -> dict[str, Any]:
    """What a model that was loaded says of its memory."""
    with edge_memllm.load(artifact, device="cpu", threads=1, **options) as model:
        memory: dict[str, Any] = model.describe()["memory"]
        return memory


def test_a_large_graph_is_kept_packed_in_the_users_cache(artifact: Path, home: Path) -> None:
    memory = loaded(artifact)
    assert memory["packed_cache"] == str(home / "packed")
    assert "mapped from the packed cache" in memory["estimate"][1]["what"]
    assert sorted(files_of(made(home / "packed"))) == [
        *("graph.onnx", "graph.onnx.data", "packed.json")
    ]


def test_nothing_is_kept_where_that_is_said_or_the_graph_is_small(
    artifact: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded(artifact, packed_cache=None)["packed_cache"] is None
    monkeypatch.undo()
    monkeypatch.setenv("EDGE_MEMLLM_HOME", str(home))
    assert loaded(artifact)["packed_cache"] is None
    assert not home.exists()


def test_the_words_for_it_are_those_of_the_command_line() -> None:
    assert [loading._packed_place(word) for word in ("auto", "off", "./auto", "folder")] == [
        *("auto", None, Path("./auto"), Path("folder"))
    ]


def no_room(home: Path, patch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(home.parent)
    patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=30_000_000))


def no_folder(home: Path, patch: pytest.MonkeyPatch) -> None:
    home.write_text("")


def no_home(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("EDGE_MEMLLM_HOME")
    patch.setattr(store, "_caches", lambda: Path.home())
    patch.setattr(Path, "home", no_such_home)


def no_such_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def no_packing(home: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ArtifactError("cannot be saved")

    patch.setattr(ort, "pack_graph", fail)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (no_room, "are free"),
        (no_folder, "cannot be written"),
        (no_home, "no home folder"),
        (no_packing, "cannot be saved"),
    ],
)
def test_what_nobody_asked_for_fails_no_load(
    artifact: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    trouble(home, monkeypatch)
    with caplog.at_level(logging.INFO):
        memory = loaded(artifact)
    assert memory["packed_cache"] is None
    assert "graph: int4 weights repacked" in memory["estimate"][1]["what"]
    (told,) = [each for each in caplog.records if "no packed weights" in each.message]
    assert reason in told.message
    # Without a home there is nowhere to keep anything; all else is a fallback, and told.
    assert told.levelno == (logging.INFO if trouble is no_home else logging.WARNING)
    assert not (home / "packed").is_dir() or not list((home / "packed").iterdir())


def test_what_is_wrong_with_the_artifact_is_told_all_the_same(artifact: Path, home: Path) -> None:
    graph = artifact / "graph.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"graph\.onnx: sha256 is"):
        loaded(artifact)


def test_what_another_version_made_goes_and_what_nobody_used_for_a_month(
    artifact: Path, cache: Path, home: Path
) -> None:
    place = made(cache)
    shutil.move(cache, home / "packed")
    old = home / "packed" / place.name
    others = [home / "packed" / name for name in ("unused", "used", "foreign")]
    for folder in others:
        shutil.copytree(old, folder)
    of_another_library(old)
    for folder in others[:2]:
        record = json.loads((folder / "packed.json").read_text())
        record["facts"]["graph"] = "0" * 64
        (folder / "packed.json").write_text(json.dumps(record))
    os.utime(others[0] / "packed.json", (0, 0))
    forget_record(others[2])
    old.rename(home / "packed" / "old")
    loaded(artifact)
    assert sorted(home.joinpath("packed").iterdir()) == sorted([old, *others[1:]])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system keeps its page cache")
@pytest.mark.parametrize(("memory", "dropped"), [(1 << 20, True), (1 << 40, False), (None, False)])
def test_where_memory_is_short_originals_leave_the_page_cache(
    artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, memory: int, dropped: bool
) -> None:
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *given: advised.append(given))
    monkeypatch.setattr(packed_cache, "available_memory", lambda: memory)
    with Artifact.open(artifact) as opened:
        open_runtime(opened, "cpu", RuntimeOptions(threads=1, packed_cache=cache)).close()
    graph = read_graph((made(cache) / "graph.onnx").read_bytes())
    originals = [graph.tensors[name] for name in graph.repacked]
    expected = {(each.start, each.size, os.POSIX_FADV_DONTNEED) for each in originals}
    assert set(advised) == (expected if dropped else set())
