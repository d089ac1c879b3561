"""Gemma 4 at its sizes, tried on tiny ones: what is written, how it is counted and shown."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gemma import __main__ as command
from benchmarks.gemma import bars, figures, folder, gguf_file, groups, measuring, page, weights
from benchmarks.gemma.making import Place
from benchmarks.gemma.shapes import SHAPES, config_of
from benchmarks.peers import page_cache
from support import ROOT

HEAVY = {"gguf", "llama_cpp", "onnxruntime", "torch", "transformers"}
MODULES = sorted(path.stem for path in (ROOT / "benchmarks" / "gemma").glob("*.py"))
SMALL = replace(SHAPES["tiny"], words=96)


def test_no_module_loads_a_heavy_library() -> None:
    names = ", ".join(f"benchmarks.gemma.{name}" for name in MODULES)
    source = f"import sys, {names}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    text = dict(config_of(SHAPES[name])["text_config"])
    config = AutoConfig.for_model(text.pop("model_type"), **text)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    wanted = {
        name.removeprefix("model."): tuple(value.shape)
        for name, value in network.state_dict().items()
        if not name.startswith("lm_head")
    }
    assert weights.tensor_shapes(SHAPES[name]) == wanted


def test_the_sizes_are_the_published_ones() -> None:
    counts = {
        name: sum(int(np.prod(size)) for size in weights.tensor_shapes(SHAPES[name]).values())
        for name in ("e2b", "e4b")
    }
    assert counts["e2b"] == pytest.approx(4.63e9, rel=0.01)
    assert counts["e4b"] == pytest.approx(7.46e9, rel=0.01)


def test_folder_and_file_hold_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_CHUNK_VALUES", 10_000)  # several chunks to a tensor
    monkeypatch.setattr(folder, "_SHARD_BYTES", 200_000)  # several shards
    folder.write_folder(SMALL, 3, tmp_path / "model")
    gguf_file.write_gguf(SMALL, 3, tmp_path / "file.gguf")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    tensors = {each.name: each for each in GGUFReader(tmp_path / "file.gguf").tensors}
    assert len(tensors) == len(index["weight_map"]) + 1  # the factors of the rotation
    for name in weights.tensor_shapes(SMALL):
        whole = f"model.language_model.{name}"
        with safe_open(tmp_path / "model" / index["weight_map"][whole], "pt") as file:
            weight = file.get_tensor(whole).float().numpy()
        stored = tensors[gguf_file._name(name)]
        kind = GGMLQuantizationType(stored.tensor_type)
        assert kind == gguf_file._kind(sys.modules["gguf"], name, weight.shape)
        assert np.array_equal(np.asarray(stored.data), quantize(weight, kind))
    offset, length = gguf_file.table_place(tmp_path / "file.gguf")
    assert length == SMALL.words * SMALL.layers * SMALL.per_layer * 18 // 32
    assert offset + length <= (tmp_path / "file.gguf").stat().st_size


def test_the_folder_is_one_that_transformers_loads(tmp_path: Path) -> None:
    folder.write_folder(SMALL, 0, tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model").get_text_config()
    assert config.num_kv_shared_layers == SMALL.shared
    assert config.layer_types == SMALL.layer_types


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["measure", "--folder", str(tmp_path)]) == 1
    assert "python -m benchmarks.gemma make makes it" in capsys.readouterr().err


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 256)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[300] == 44
        assert [size for _, _, size in page_cache._mappings(file)] == [1 << 16]
        page_cache.drop(file, 4097, 9000)
        assert mapped[300] == 44
        assert mapped[5000] == 5000 % 256


def test_without_groups_of_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "group_folders", lambda controller: iter(()))
    with pytest.raises(groups.NoGroupError, match="no memory groups"), groups.memory_group(1):
        pass


def test_a_group_is_made_limited_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "group_folders", lambda controller: iter([tmp_path]))
    made = tmp_path / "gemma-1000"
    made.mkdir()
    (made / "memory.max").write_text("max")
    with groups.memory_group(1000) as group:
        assert (group / "memory.max").read_text() == "1000"
        (group / "memory.max").unlink()  # a folder of the system's goes with its files
    assert not made.exists()


def test_all_have_the_same_runs_and_cold_ones_come_before_warm_ones(tmp_path: Path) -> None:
    assert [each.cold for each in measuring.RUNS] == [True, True, False, True, False, False]
    place = Place(tmp_path, "tiny")
    place.checkpoint.parent.mkdir(parents=True)
    gguf_file.write_gguf(SMALL, 0, place.gguf)
    assert all("cold" in each.settings for each in measuring.contenders(place))


def one_round(factor: float) -> dict[str, dict[str, Any]]:
    speeds = dict.fromkeys(("decode_128", "decode_1024", "prefill"), 10.0)
    cold = {"decode_128_cold": 9.9, "prefill_cold": 9.0}
    resident = dict.fromkeys(cold, 10.0)
    rest = {"load": 2.0, "first_token": 3.0, "own_memory": 1300.0, "mapped_memory": 700.0}
    same = {**rest, "peak_memory": 2100.0, "settings": {"threads": 2}, "taken_by_others": 0.0}
    return {
        measuring.OURS: {**{k: v * factor for k, v in {**speeds, **cold}.items()}, **same},
        measuring.IN_MEMORY: {**{k: v * factor for k, v in {**speeds, **resident}.items()}, **same},
        measuring.LLAMA: {**speeds, **same},
        measuring.LAZY: {**speeds, **cold, **same},
    }


RESULTS = {
    "e2b": {
        "rounds": [one_round(1.0), one_round(1.5), one_round(2.0)],
        "limited": [
            {"contender": measuring.OURS, "limit": None, **one_round(1)[measuring.OURS]},
            {"contender": measuring.OURS, "limit": 2_000_000_000, "ended": "out of memory"},
        ],
        "exports": {
            "int4": {
                "checkpoint_bytes": 9_000_000_000,
                "seconds": 300.0,
                "processor_seconds": 420.0,
                "peak_anonymous_bytes": 3_500_000_000,
                "options": "--graph-weights int4",
            }
        },
        "bytes": {"q4_0.gguf": {"file": 2_600_000_000}},
        "threads": 2,
        "environment": {"processor": "one"},
    }
}


def test_ratios_are_taken_round_by_round() -> None:
    rounds = RESULTS["e2b"]["rounds"]
    assert figures.ratios(rounds, "decode_128", measuring.LLAMA) == [1.0, 1.5, 2.0]
    assert figures.ratios(rounds, "decode_128_cold", measuring.LLAMA) == []  # not measured
    cold = figures.ratios(rounds, "decode_128_cold", measuring.IN_MEMORY)
    assert cold == pytest.approx([0.99] * 3)


def test_bars_say_what_is_met_and_what_is_not() -> None:
    found = {words: (share, met) for words, _, share, met in bars.bars(RESULTS["e2b"])}
    assert found["edge-memllm: own memory"] == ("1.3 GB", "met")
    assert found["decode at 128, to llama.cpp's table in memory"] == ("1.5", "met")
    assert found["prefill, to llama.cpp's table in memory"] == ("1.5", "not met")
    assert found["decode in a group of 2 GB, to none"] == ("0", "not met")
    assert found["export, peak of own memory"] == ("3.5 GB", "not met")


def test_the_page_shows_what_was_measured() -> None:
    found = page.page_files(RESULTS)
    text = found[page.PAGE]
    assert "| decode at 128, tokens/s | 15 (10 to 20) |" in text
    assert "| edge-memllm | 2 GB | out of memory |" in text
    assert "q4_0.gguf: file 2.60 GB" in text
    assert "E2B: llama.cpp, lazy" in found[page.PICTURE]
    assert "Not measured yet." in page.page_files({})[page.PAGE]


def test_the_page_is_the_one_of_the_stored_figures() -> None:
    assert page.write_page(check=True) == 0


def test_every_contender_has_its_files_and_settings(tmp_path: Path) -> None:
    place = Place(tmp_path, "tiny")
    place.checkpoint.parent.mkdir(parents=True)
    gguf_file.write_gguf(SMALL, 0, place.gguf)
    names = [each.name for each in measuring.contenders(place)]
    assert names == [measuring.OURS, measuring.IN_MEMORY, measuring.LLAMA, measuring.LAZY]
    place.artifact("int2").mkdir()
    assert measuring.TWO_BITS in [each.name for each in measuring.contenders(place)]
