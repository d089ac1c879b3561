"""Kernels of our own in a graph: what they take over, and that it computes the same."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.table.table import Table
from edge_memllm_runtimes.cpu_graph import INPUT_BITS, CpuGraph, for_cpu
from edge_memllm_runtimes.cpu_graph.edited import EditedGraph
from edge_memllm_runtimes.graph_file import read_graph
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.ort_graph import read_checked_graph
from edge_memllm_runtimes.own_kernels import installed_kernels
from edge_memllm_runtimes.runtime import open_runtime
from support.checkpoints import LAYERS, MakeArtifact, write_dense
from support.gates import export_gates, write_gates
from support.gguf_files import metadata_of, random_model, stored_tensors, write_gguf

onnx = pytest.importorskip("onnx")
pytest.importorskip("edge_memllm_kernels")
needs_kernels = pytest.mark.skipif(
    installed_kernels() is None, reason="no kernels for this processor"
)

IDS = np.random.default_rng(5).integers(0, 96, 90).tolist()
OWN = "edge_memllm"
FORMS: dict[str, dict[str, Any]] = {
    "int4": {"graph_weights": "int4", "table_codec": "int8"},
    "int8 grouped": {"graph_weights": "int8", "beta": 2, "num_key_value_heads": 2},
    "float32 keys": {"graph_weights": "int4", "kv_dtype": "float32", "qk_norm": True},
    "int8 keys": {"graph_weights": "int4", "kv_dtype": "int8"},
    "biases": {"graph_weights": "int8", "beta": 8, "attention_bias": True},
    "fp32": {"graph_weights": "fp32", "table_codec": "f32"},
    "heads of 20": {"graph_weights": "int4", "head_dim": 20},
}


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file in Q4_1, exported: matrices of the file's own grid, with minima."""
    from edge_memllm_export import export_model

    folder = tmp_path_factory.mktemp("q4_1")
    network = random_model("llama")
    tensors = stored_tensors("llama", network)
    kind = gguf.GGMLQuantizationType.Q4_1
    file = write_gguf(folder / "model.gguf", "llama", metadata_of("llama"), tensors, kind)
    export_model(file, folder / "out", graph_weights="auto", verify=False)
    return folder / "out"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edge_memllm_export import export_model

    folder = tmp_path_factory.mktemp("gemma3")
    write_dense(folder / "checkpoint", "gemma3_text", 0)
    export_model(folder / "checkpoint", folder / "out", graph_weights="int4", verify=False)
    return folder / "out"


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma4")
    exported = {"graph_weights": "int4", "table_codec": "int8"}
    return export_gates(write_gates(folder / "checkpoint"), folder / "out", **exported)


@pytest.fixture(params=[*FORMS, "llama_file", "gemma3", "gemma4"])
def folder(request: pytest.FixtureRequest, make_artifact: MakeArtifact) -> Path:
    if request.param in FORMS:
        return make_artifact(**FORMS[request.param])
    found: Path = request.getfixturevalue(request.param)
    return found


def logits_of(
    folder: Path, lengths: list[int], batch: int = 1, threads: int = 1, **options: Any
) -> np.ndarray:
    """Logits [T, V] of `IDS`, fed in pieces of these lengths, beside other texts in a batch."""
    parts, place = [], 0
    with Artifact.open(folder) as artifact, closing(Table.open(artifact, "ram")) as table:
        chosen = RuntimeOptions(threads=threads, **options)
        runtime = open_runtime(artifact, "cpu", chosen)
        with Feeder(runtime, table, batch, max(lengths)) as feeder:
            for other in range(1, batch):
                feeder.prefill(other, IDS[other : 20 * other])
            for length in lengths:
                ids = IDS[place : place + length]
                if batch > 1 and length == 1:
                    rows = feeder.decode([ids[0], *IDS[1:batch]])[:1]
                else:
                    rows = feeder.score(0, ids)
                parts.append(np.array(rows, np.float32))
                place += length
        runtime.close()
    return np.concatenate(parts)


def nodes_of(folder: Path, **options: Any) -> Counter[tuple[str, str]]:
    with Artifact.open(folder) as artifact:
        content = for_cpu(read_checked_graph(artifact).content, **options).content
    found = read_graph(content, rewritten=True).nodes
    return Counter((each.domain, each.op_type) for each in found)


def test_products_and_attention_are_taken_over(make_artifact: MakeArtifact) -> None:
    folder = make_artifact(graph_weights="int4", beta=8)
    before, after = nodes_of(folder), nodes_of(folder, input_bits=INPUT_BITS)
    products, layers = before["com.microsoft", "MatMulNBits"], LAYERS
    assert after[OWN, "MatMulNBits"] == products
    assert after[OWN, "GroupQueryAttention"] == layers
    assert not {name for domain, name in after if domain == "com.microsoft"} & {
        "MatMulNBits",
        "GroupQueryAttention",
    }
    # A gate goes through its product; only casts of records and of no layer are left.
    for name in ("Split", "Sigmoid"):
        assert before["", name] == layers
        assert after["", name] == 0
    assert after["", "Cast"] <= 1


def test_sums_for_minima_are_made_in_the_product(llama_file: Path) -> None:
    before, after = nodes_of(llama_file), nodes_of(llama_file, input_bits=INPUT_BITS)
    for name in ("ReduceSum", "Concat"):
        assert before["", name] > 0
        assert after["", name] == 0


def test_gates_with_gelu_are_taken_over(gemma3: Path) -> None:
    assert nodes_of(gemma3)["com.microsoft", "FastGelu"] > 0
    assert nodes_of(gemma3, input_bits=INPUT_BITS)["com.microsoft", "FastGelu"] == 0


def test_matrices_of_two_bits_stay_with_the_library(make_artifact: MakeArtifact) -> None:
    folder = make_artifact(graph_weights="int2", beta=8)
    assert nodes_of(folder, input_bits=INPUT_BITS)["com.microsoft", "MatMulNBits"] > 0


def test_attention_that_rolls_is_taken_over(gemma3: Path) -> None:
    before, after = nodes_of(gemma3), nodes_of(gemma3, input_bits=INPUT_BITS)
    assert after[OWN, "GroupQueryAttention"] == before["com.microsoft", "GroupQueryAttention"]


def test_attention_over_keys_of_other_layers_is_taken_over(tmp_path: Path) -> None:
    folder = export_gates(write_gates(tmp_path / "checkpoint"), tmp_path / "out")
    before, after = nodes_of(folder), nodes_of(folder, input_bits=INPUT_BITS)
    readers = 3
    assert before["", "Slice"] > readers  # the library is given no more than it looks at
    assert after["", "Slice"] == readers  # keys of no token
    assert after["com.microsoft", "GroupQueryAttention"] == 0


def exact(content: bytes, **options: Any) -> CpuGraph:
    """The graph for a CPU; the library does not round the inputs of its products."""
    stored = EditedGraph(content)
    for each in stored.nodes:
        for field in each.get("attribute", ()):
            if field["name"] == "accuracy_level":
                field["i"] = 0
    return for_cpu(stored.bytes(), **options)


def missed(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


@needs_kernels
def test_they_compute_what_the_weights_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = logits_of(folder, [len(IDS)])
    library = logits_of(folder, [len(IDS)], own_kernels=False)
    monkeypatch.setattr("edge_memllm_runtimes.ort_graph.for_cpu", exact)
    expected = logits_of(folder, [len(IDS)], own_kernels=False)
    found = logits_of(folder, [len(IDS)])
    bound = 5e-3 if keys_of(folder) == "int8" else 1e-3
    assert missed(found, expected) < bound
    # Inputs that may be rounded to 8 bits are, no worse than the library does it.
    assert missed(rounded, expected) < 1.5 * missed(library, expected) + bound


def keys_of(folder: Path) -> str:
    with Artifact.open(folder) as artifact:
        return artifact.manifest.graph.kv_dtype


@needs_kernels
def test_results_do_not_depend_on_what_is_computed_beside_them(folder: Path) -> None:
    left = {name for domain, name in nodes_of(folder, input_bits=INPUT_BITS) if domain != OWN}
    if keys_of(folder) == "int8" or left & {"GroupQueryAttention", "MatMulNBits", "MatMul"}:
        pytest.skip("what is computed by the library may depend on it")
    whole = logits_of(folder, [len(IDS)])
    pieces = logits_of(folder, [1, 2, 30, 1, 1, 7, 40, 1, 1, 1, 5])
    np.testing.assert_array_equal(pieces, whole)
    beside = logits_of(folder, [60, *itertools.repeat(1, 30)], batch=3, threads=2)
    np.testing.assert_array_equal(beside, whole)


@needs_kernels
def test_the_runtime_says_what_it_computes_with(make_artifact: MakeArtifact) -> None:
    kernels = installed_kernels()
    assert kernels is not None
    folder = make_artifact(graph_weights="int4")
    with edge_memllm.load(folder, device="cpu", threads=1) as model:
        assert model.runtime.name.endswith(f" with {kernels.name}")
    with Artifact.open(folder) as artifact:
        runtime = open_runtime(artifact, "cpu", RuntimeOptions(threads=1, own_kernels=False))
        assert "kernels" not in runtime.name
        runtime.close()


def pretend(monkeypatch: pytest.MonkeyPatch, **package: Any) -> None:
    monkeypatch.setitem(
        __import__("sys").modules, "edge_memllm_kernels", SimpleNamespace(**package)
    )


def test_a_processor_without_kernels_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, processor=lambda: "", library=lambda: Path("x"), __version__="1")
    assert installed_kernels() is None


def test_without_the_package_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "edge_memllm_kernels", None)
    assert installed_kernels() is None


def test_an_environment_that_asks_for_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_MEMLLM_KERNELS", "fastest")
    with pytest.raises(EdgeMemLLMError, match=r"EDGE_MEMLLM_KERNELS is 'fastest' in the env"):
        installed_kernels()


def test_a_package_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FileNotFoundError("x.so: the compiled library is not there")

    pretend(monkeypatch, processor=lambda: "avx2", library=missing, __version__="1")
    with pytest.raises(EdgeMemLLMError, match=r"^edge-memllm-kernels: x\.so: the compiled lib"):
        installed_kernels()


@needs_kernels
def test_kept_weights_are_those_of_the_kernels(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = make_artifact(graph_weights="int4"), tmp_path / "cache"
    expected = logits_of(folder, [len(IDS)])
    np.testing.assert_array_equal(logits_of(folder, [len(IDS)], packed_cache=cache), expected)
    np.testing.assert_array_equal(logits_of(folder, [len(IDS)], packed_cache=cache), expected)
    assert len(list(cache.iterdir())) == 1
