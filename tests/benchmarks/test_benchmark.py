"""The parts of a measurement, each by itself."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.artifact.folder import Artifact
from edge_memllm.benchmark import machine as bandwidth
from edge_memllm.benchmark.machine import (
    DeviceProbe,
    MemoryBandwidth,
    array_size,
    cached_share,
    describe_storage,
    evictor,
    weight_bytes,
)
from edge_memllm.benchmark.plan import (
    Plan,
    Variant,
    check_room,
    distinct_prompt,
    readers_for,
    text_prompt,
)
from edge_memllm.benchmark.report import quartiles, ratio_of_medians
from edge_memllm.benchmark.rounds import _turns
from edge_memllm.errors import RequestError, RuntimeUnavailableError, StorageError
from support.checkpoints import VOCABULARY, MakeArtifact
from support.small_model import file_spec, write_artifact

PLAN = Plan(contexts=(6,), new_tokens=3, repeats=2, seed=5)


# figures


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_ratio_of_pairs_that_move_together_is_exact(below: list[float], factor: float) -> None:
    ratio = ratio_of_medians([factor * each for each in below], below)
    assert ratio.ratio == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


def test_a_ratio_and_its_words() -> None:
    ratio = ratio_of_medians([104, 101, 107], [100, 100, 100])
    assert str(ratio) == "1.04x (1.01 to 1.07)"
    assert ratio.verdict == "higher"
    assert ratio_of_medians([1.0, 3.0], [2.0, 2.0]).verdict == "no difference seen"
    assert ratio_of_medians([1.0], [2.0]).verdict == "lower"
    assert quartiles([1, 2, 3, 4, 5]) == [2, 4]
    with pytest.raises(ValueError, match="2 and 1 figures, expected pairs"):
        ratio_of_medians([1.0, 2.0], [1.0])


def test_every_worker_has_its_turn_in_every_round_and_place() -> None:
    turns = list(_turns(3, Plan(contexts=(5, 9), new_tokens=2, repeats=3)))
    assert len(turns) == len(set(turns)) == 3 * 2 * 3
    first = [index for number, context, index in turns if context == 5]
    assert first == [0, 1, 2, 1, 2, 0, 2, 0, 1]


# plans


def test_prompts_are_distinct_and_repeatable() -> None:
    first, second = (distinct_prompt(PLAN, 200, number, VOCABULARY) for number in range(2))
    assert len(set(first)) == len(set(second)) == 200
    assert first != second
    assert distinct_prompt(PLAN, 200, 0, VOCABULARY) == first


def test_prompts_of_a_text_are_spread_over_it() -> None:
    tokens = list(range(10))
    plan = Plan(contexts=(4,), new_tokens=2, repeats=3, text="text")
    found = [text_prompt(plan, 4, number, tokens) for number in range(4)]
    assert found == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [6, 7, 8, 9]]
    with pytest.raises(RequestError, match="has 10 tokens, 11 were asked for"):
        text_prompt(plan, 11, 0, tokens)


def test_what_a_model_has_no_room_for() -> None:
    with pytest.raises(RequestError, match="6 distinct tokens was asked for, the vocabulary has 5"):
        check_room(PLAN, vocabulary=5, context=100)
    with pytest.raises(RequestError, match="6 prompt and 3 new tokens were asked for"):
        check_room(PLAN, vocabulary=100, context=8)
    check_room(
        Plan(contexts=(6,), new_tokens=3, text="a text may repeat tokens"),
        vocabulary=5,
        context=100,
    )


def test_readers_are_used_where_they_can_be() -> None:
    assert readers_for(["cold", "direct", "resident"], []) == [
        ("cold", "pread"),
        ("direct", "direct"),
        ("resident", "ram"),
    ]
    assert readers_for(["warm", "direct"], ["uring", "mmap", "pread"]) == [
        ("warm", "mmap"),
        ("warm", "pread"),
        ("direct", "uring"),
    ]
    with pytest.raises(RequestError, match="The reader 'auto' cannot be measured"):
        readers_for(["warm"], ["auto"])


def test_what_outputs_depend_on() -> None:
    variant = Variant("a", Path("x"), "cold", "pread", {"threads": 1, "record_cache": 5})
    assert (
        variant.computation
        == Variant("b", Path("x"), "resident", "ram", {"threads": 1}).computation
    )
    assert (
        variant.computation != Variant("a", Path("x"), "cold", "pread", {"threads": 2}).computation
    )
    assert Variant.from_dict(json.loads(json.dumps(variant.as_dict()))) == variant


# the page cache


def test_pages_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    before = cached_share(path)
    if before is None:
        pytest.skip("no mincore here")
    assert before == 1
    with evictor(path) as evict:
        evict()
    assert cached_share(path) in (0, 1)  # 1 where the folder itself lies in memory


def test_a_system_without_mincore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", none)
    assert cached_share(tmp_path) is None


def test_cold_needs_a_system_that_can_drop_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    with (
        pytest.raises(RuntimeUnavailableError, match="--cache cold needs posix_fadvise"),
        evictor(tmp_path),
    ):
        pass


# memory


def test_bandwidth_is_bytes_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(bandwidth, "perf_counter", lambda: next(ticks) / 4)
    with MemoryBandwidth(array_bytes=1 << 16) as memory:
        sample = memory.sample(threads=3)
        assert sample.median == sample.best == 4 * (1 << 16)
        assert memory.method(3) == "numpy max of int32"  # the first of equals


def test_the_array_is_larger_than_the_cache_and_a_part_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "memory_bytes", lambda: 64 << 30)
    assert array_size(tmp_path) == 256 << 20
    for index, size in enumerate(("32K", "odd", "512M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert array_size(tmp_path) == 2 << 30
    monkeypatch.setattr(bandwidth, "memory_bytes", lambda: 1 << 30)
    assert array_size(tmp_path) == 128 << 20
    monkeypatch.setattr(bandwidth, "memory_bytes", lambda: None)
    assert array_size(tmp_path) == 2 << 30


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_weights_are_counted_without_what_a_step_does_not_read(
    weights: str, make_artifact: MakeArtifact
) -> None:
    import onnx

    path = make_artifact(graph_weights=weights, beta=3)
    tensors = {
        tensor.name: len(tensor.raw_data)
        for tensor in onnx.load(path / "graph.onnx").graph.initializer
    }
    angles = tensors["cos_cache"] + tensors["sin_cache"]
    with Artifact.open(path) as artifact:
        assert weight_bytes(artifact) == sum(tensors.values()) - angles


def test_weights_in_a_file_of_their_own_are_counted(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    import onnx

    source = make_artifact(graph_weights="fp32", beta=3)
    path = Path(shutil.copytree(source, tmp_path / "artifact"))
    with Artifact.open(path) as artifact:
        inside, manifest = weight_bytes(artifact), artifact.manifest
    model = onnx.load(path / "graph.onnx")
    names = ("graph.onnx", "w")
    onnx.save_model(
        model, path / names[0], save_as_external_data=True, location="w", size_threshold=0
    )
    files = {name: file_spec((path / name).read_bytes()) for name in names}
    changed = replace(
        manifest,
        graph=replace(manifest.graph, external_data="w"),
        files=manifest.files | files,
    )
    (path / "manifest.json").write_bytes(changed.to_json())
    with Artifact.open(path) as artifact:
        assert weight_bytes(artifact) == inside


# storage


def test_storage_is_described_as_far_as_it_is_known(tmp_path: Path) -> None:
    number = os.stat(tmp_path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    disk = tmp_path / "disk"
    (disk / "part" / "partition").mkdir(parents=True)
    (disk / "device").mkdir()
    (disk / "queue").mkdir()
    (disk / "device" / "model").write_text("Fast One\n")
    (disk / "queue" / "rotational").write_text("0\n")
    (disk / "queue" / "logical_block_size").write_text("512\n")
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / name).symlink_to(disk / "part")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"1 2 99:9 / /x rw - xfs a b\n1 2 {name} / / rw shared:1 - ext4 a b\n")
    assert describe_storage(tmp_path, tmp_path / "devices", mounts) == {
        "model": "Fast One",
        "driver": None,
        "rotational": False,
        "logical_block_bytes": 512,
        "file_system": "ext4",
    }
    nothing = describe_storage(tmp_path, tmp_path / "none", tmp_path / "none")
    assert set(nothing.values()) == {None}


def probe_or_skip(artifact: Artifact) -> DeviceProbe:
    try:
        return DeviceProbe(artifact)
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))


def test_a_device_is_read_record_by_record_and_in_batches(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "made")
    with Artifact.open(made.path) as artifact, probe_or_skip(artifact) as probe:
        assert len(probe.single_seconds([3, 0, 23])) == 2
        assert probe.ways[0] == "16 threads with O_DIRECT"
        for way in probe.ways:
            assert probe.batch_rate(way, range(24)) > 0


def test_a_probe_notices_a_table_cut_short(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "made")
    with Artifact.open(made.path) as artifact, probe_or_skip(artifact) as probe:
        os.truncate(made.table, made.manifest.table.records_offset + 512)
        with pytest.raises(StorageError, match=r"gives 0 bytes from byte \d+ on.*copy the"):
            probe.single_seconds([23])


def test_systems_and_folders_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    made = write_artifact(tmp_path / "made")
    with Artifact.open(made.path) as artifact:
        monkeypatch.setattr("os.preadv", refuse)
        with pytest.raises(RuntimeUnavailableError, match="takes no direct reads"):
            DeviceProbe(artifact)
        monkeypatch.undo()
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        with pytest.raises(RuntimeUnavailableError, match="has no O_DIRECT"):
            DeviceProbe(artifact)


def test_numpy_reductions_of_the_methods_read_everything() -> None:
    array = np.ones(1 << 10, np.uint64)
    array[-1] = 1 << 30
    for kind, reduce in bandwidth._METHODS.values():
        assert reduce(array.view(kind)) >= 1 << 30
