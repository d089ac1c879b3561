"""The estimate of memory, and the limits set against it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.artifact.manifest import FileSpec, Manifest
from edge_memllm.errors import EdgeMemLLMError, RequestError
from edge_memllm.memory_plan import (
    Choices,
    Item,
    arithmetic,
    footprint,
    memory_items,
    plan_memory,
    position_bytes,
    total,
)
from edge_memllm_runtimes.kv_cache import GrowingCache, KVBudget
from support.small_model import write_artifact


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A graph of 100 MB of int4 weights, as far as the manifest knows; context 128."""
    made = write_artifact(tmp_path_factory.mktemp("plan") / "artifact").manifest
    graph = dataclasses.replace(made.graph, weights="int4")
    files = made.files | {graph.file: FileSpec(100_000_000, "0" * 64)}
    return dataclasses.replace(made, graph=graph, files=files)


def lines(items: Any) -> dict[str, int]:
    return {item.what: item.bytes for item in items}


def test_the_lines_are_what_was_chosen(manifest: Manifest) -> None:
    found = lines(memory_items(manifest, Choices(prefill_chunk=8)))
    record, width, layers = manifest.table.record_bytes, 64, 2
    assert found == {
        "interpreter and libraries": 40_000_000,
        "graph: int4 weights repacked": 190_000_000,
        "tokenizer": 3_000_000 + 400 * 24,
        "checksums of the table's records": 24 * 8,
        "records of 2 x 8 tokens of a prompt": 2 * 8 * record,
        "work on 8 tokens of a prompt": 8 * (layers + 60) * width * 4,
    }
    more = lines(memory_items(manifest, Choices(8, record_cache=5000, reader="ram")))
    assert more.items() - found.items() == {
        ("record cache", 5000),
        ("table in memory", 24 * manifest.table.stride),
    }


def test_a_tokenizer_with_its_vocabulary_file_takes_little_more_than_that(
    manifest: Manifest,
) -> None:
    files = manifest.files | {"tokenizer.safetensors": FileSpec(13_000_000, "0" * 64)}
    found = lines(memory_items(dataclasses.replace(manifest, files=files), Choices()))
    assert found["tokenizer"] == 19_000_000
    files = {name: spec for name, spec in files.items() if not name.startswith("tokenizer")}
    found = lines(memory_items(dataclasses.replace(manifest, files=files), Choices()))
    assert "tokenizer" not in found


def test_mapped_and_packed_weights_take_less(manifest: Manifest) -> None:
    graph = dataclasses.replace(manifest.graph, external_data="graph.onnx.data")
    files = manifest.files | {
        "graph.onnx": FileSpec(1_000_000, "0" * 64),
        "graph.onnx.data": FileSpec(99_000_000, "0" * 64),
    }
    beside = dataclasses.replace(manifest, graph=graph, files=files)
    found = lines(memory_items(beside, Choices()))
    assert found["graph: int4 weights repacked"] == 165e6
    packed = lines(memory_items(beside, Choices(packed=True)))
    assert packed["graph: int4 weights mapped from the packed cache, what is left of them"] == 30e6


@pytest.mark.parametrize("weights", ["int2", "mixed"])
def test_two_bits_take_more_of_their_file_than_four(manifest: Manifest, weights: str) -> None:
    """Their scales, which become float32, are more of it."""
    graph = dataclasses.replace(manifest.graph, external_data="data", weights=weights)
    files = manifest.files | {
        name: FileSpec(50_000_000, "0" * 64) for name in ("graph.onnx", "data")
    }
    found = lines(memory_items(dataclasses.replace(manifest, graph=graph, files=files), Choices()))
    assert found[f"graph: {weights} weights repacked"] == 205e6


def test_a_longer_text_and_more_tokens_at_a_time_take_more(manifest: Manifest) -> None:
    wide = dataclasses.replace(
        manifest, model=dataclasses.replace(manifest.model, max_position_embeddings=4096)
    )
    short, long = footprint(wide, 100), footprint(wide, 4096)
    assert short.kv_bytes == 256 * position_bytes(wide)
    assert long.kv_bytes == 4096 * position_bytes(wide)
    assert long.resident_bytes > short.resident_bytes
    assert footprint(wide, 100, Choices(1024)).resident_bytes > short.resident_bytes
    assert (
        long.resident_bytes_with_table - long.resident_bytes
        == manifest.model.vocab_size * manifest.table.stride
    )


def test_keys_and_values_of_a_position(manifest: Manifest) -> None:
    assert position_bytes(manifest) == 2 * 2 * 2 * 16 * 4  # layers, heads, width, float32
    graph = dataclasses.replace(manifest.graph, kv_dtype="int8")
    assert position_bytes(dataclasses.replace(manifest, graph=graph)) == 2 * 2 * 2 * 16


def test_a_limit_that_does_not_fit_shows_its_arithmetic(manifest: Manifest) -> None:
    with pytest.raises(RequestError, match="memory_limit is 200,000,000 bytes and about") as caught:
        plan_memory(manifest, "cpu", Choices(), memory_limit=200_000_000)
    text = str(caught.value).splitlines()
    figures = [int(line.split()[0].replace(",", "")) for line in text[1:-1]]
    assert sum(figures[:-1]) == figures[-1] > 200_000_000
    assert "190,000,000  graph: int4 weights repacked" in str(caught.value)
    assert "keys, values and attention of the first 128 positions" in str(caught.value)
    assert text[-1].startswith("Raise the limit, lower prefill_chunk")


def test_what_a_limit_leaves_goes_to_keys_and_values(manifest: Manifest) -> None:
    plan = plan_memory(manifest, "cpu", Choices(), memory_limit=300_000_000)
    assert plan.kv_bytes == 300_000_000 - total(plan.items)
    without = plan_memory(manifest, "cpu", Choices())
    assert without.kv_bytes is None
    assert json.loads(json.dumps(plan.as_dict()))["limit_bytes"] == 300_000_000


def test_what_the_process_holds_already_counts(manifest: Manifest) -> None:
    plan = plan_memory(manifest, "cpu", Choices(), base_bytes=500_000_000)
    assert plan.items[0] == Item("interpreter and libraries", 500_000_000)
    assert plan.loaded_bytes == sum(item.bytes for item in plan.items[1:] if item.at_load)
    with pytest.raises(RequestError, match="500,000,000  interpreter and libraries"):
        plan_memory(manifest, "cpu", Choices(), memory_limit=400_000_000, base_bytes=500_000_000)


def test_a_device_has_a_limit_of_its_own(manifest: Manifest) -> None:
    plan = plan_memory(
        manifest, "cuda", Choices(64), memory_limit=10**9, vram_limit=10**9, base_bytes=None
    )
    assert not any(item.what.startswith("graph") for item in plan.items)
    assert plan.arena_bytes is not None
    assert plan.kv_bytes is not None
    # Never more in all than was allowed, the allocator's rounding counted.
    assert plan.arena_bytes + 2 * plan.kv_bytes <= 10**9
    assert plan.arena_bytes >= 100_000_000
    report = plan.as_dict()
    assert report["device_estimate_bytes"] == total(plan.device_items)
    with pytest.raises(RequestError, match="vram_limit is 100,000,000 bytes") as caught:
        plan_memory(manifest, "cuda", Choices(64), vram_limit=100_000_000)
    for line in ("graph: int4 weights", "largest matrix", "work on 64", "twice: rounded up"):
        assert line in str(caught.value)
    with pytest.raises(RequestError, match="memory_limit is 1,000 bytes"):
        plan_memory(manifest, "cuda", Choices(64), memory_limit=1000)


def test_the_sum_is_aligned() -> None:
    assert arithmetic([Item("one", 1), Item("more", 1234)]) == (
        "      1  one\n  1,234  more\n  1,235  in all"
    )


class Positions(GrowingCache):
    """A cache that only counts."""

    @property
    def nbytes(self) -> int:
        return self.capacity

    def _grow(self, capacity: int) -> None:
        if capacity > 3000:
            raise MemoryError

    def _nothing(self, *_: object) -> dict[str, Any]:
        return {}

    _copy = _swap = _load_state = _free = _nothing
    state_layout = _state = _nothing


def test_a_cache_grows_to_what_the_limit_leaves_and_no_further() -> None:
    cache = Positions(2, 4096, position_bytes=10, budget=KVBudget(20 * 600 + 7))
    cache.ensure(256)
    cache.ensure(560)
    assert cache.capacity == 560  # not 768, which does not fit
    with pytest.raises(
        RequestError,
        match=r"601 positions of 2 sequences are needed, 600 fit: a position takes 20 bytes .* of "
        r"the 12,007 bytes that the memory limit leaves for them 12,007 are free",
    ):
        cache.ensure(601)
    assert cache.capacity == 560
    cache.ensure(600)


def test_caches_share_the_limit_and_give_back(random: np.random.Generator) -> None:
    budget = KVBudget(10 * 1000, score_bytes=5)
    first = Positions(1, 4096, position_bytes=5, budget=budget)
    second = Positions(1, 4096, position_bytes=5, budget=budget)
    first.ensure(700)
    with pytest.raises(RequestError, match=r"one sequence are needed, 232 fit"):
        second.ensure(300)
    assert second.capacity == 0
    second.ensure(200)
    first.close()
    first.close()
    second.ensure(900)


def test_without_memory_what_was_held_is_given_back() -> None:
    budget = KVBudget(10**9)
    cache = Positions(1, 10_000, position_bytes=1, budget=budget)
    with pytest.raises(EdgeMemLLMError, match="There is no memory for keys and values"):
        cache.ensure(4000)
    assert budget.exchange(0, 10**9) is None


def test_estimates_are_told_without_a_limit(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "artifact")
    plan = plan_memory(made.manifest, "cpu", Choices())
    assert plan.as_dict()["limit_bytes"] is None
    assert "device_limit_bytes" not in plan.as_dict()
