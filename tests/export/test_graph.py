"""The graph by itself: fed by hand, against the network it was built from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edge_memllm.codecs import get_codec
from edge_memllm.errors import ExportError
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph.model import (
    EXTERNAL_FILE,
    GRAPH_FILE,
    GraphForm,
    build_graph,
    save_graph,
)
from edge_memllm_export.weights.quantizer import block_for, quantize
from support.checkpoints import MakeCheckpoint
from support.graphs import IDENTITY, GraphSession
from support.matrices import dequantize

SHAPES: list[dict[str, Any]] = [
    {"beta": 0},
    {"beta": 0, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"beta": 0, "memory_gain": [0.5, -1.5]},
    {"beta": 0, "head_dim": 12},
    {"beta": 1},
    {"beta": 1, "num_key_value_heads": 1},
    {"beta": 2, "tie_word_embeddings": True},
    {"beta": 3, "num_key_value_heads": 2},
    {"beta": 3, "memory_norm": "shared"},
    {"beta": 3, "head_dim": 60, "num_attention_heads": 2},
    {"beta": 0, "memory_norm": "shared"},
    {"beta": 0, "memory_source": "table"},
    {"beta": 3, "memory_source": "both", "memory_sharing": "all_layers"},
    {"beta": 0, "memory_sharing": "all_layers", "memory_gain": [0.5, -1.5]},
]
DENSE: list[dict[str, Any]] = [
    {"beta": 8},
    {"beta": 8, "intermediate_size": 0},
    {"beta": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
]
CODECS = ("f32", "f16", "int8-g64", "int4-g32", "int4-g64")
FAMILY = [(shape, codec) for shape in SHAPES for codec in CODECS] + [(s, "none") for s in DENSE]


@pytest.fixture
def tokens(random: np.random.Generator) -> list[int]:
    """24 tokens, some of them twice."""
    return random.integers(0, 300, 18).tolist() + random.integers(0, 4, 6).tolist()


def name_of(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items())
    return str(value)


@pytest.mark.parametrize(("shape", "codec"), FAMILY, ids=name_of)
def test_fp32_graph_is_the_network(
    shape: dict[str, Any],
    codec: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    tokens: list[int],
) -> None:
    graph = GraphSession(make_checkpoint(**shape), "fp32", codec, tmp_path)
    expected = graph.judged_logits(tokens)
    whole = graph.logits(tokens, len(tokens))
    assert expected.std() > 1  # flat logits would agree whatever the graph computes
    assert np.abs(whole - expected).max() <= 1e-4
    assert np.abs(graph.logits(tokens, 1) - whole).max() <= 1e-4  # cached decode
    assert np.abs(graph.logits(tokens, 7) - whole).max() <= 1e-4  # chunked prefill


@pytest.mark.parametrize("shape", [*SHAPES, *DENSE], ids=name_of)
def test_greedy_tokens_are_those_of_generate(
    shape: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    codec = "none" if shape["beta"] == 8 else "f32"
    graph = GraphSession(make_checkpoint(**shape), "fp32", codec, tmp_path)
    prompt = [1, 2, 3, 2, 1]
    expected = graph.network.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=16, max_new_tokens=16
    )[0].tolist()
    ids = list(prompt)
    logits, cache = graph.step(np.array([ids]), [len(ids)], graph.empty_cache(), np.array([[4]]))
    while len(ids) < len(expected):
        logits[0, 0, graph.config.eos_token_id] = -np.inf  # min_new_tokens forbids the end
        ids.append(int(logits[0, 0].argmax()))
        logits, cache = graph.step(np.array([ids[-1:]]), [len(ids)], cache, np.array([[0]]))
    assert ids == expected


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[7], DENSE[1]], ids=name_of)
def test_batch_of_unequal_lengths_decodes_like_one_at_a_time(
    shape: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    codec = "none" if shape["beta"] == 8 else "int8-g64"
    graph = GraphSession(make_checkpoint(**shape), "fp32", codec, tmp_path)
    texts = [[5, 6, 7, 8], [9, 10]]
    batch = graph.empty_cache(batch=2)
    for number, text in enumerate(texts):
        alone = {name: value[number : number + 1] for name, value in batch.items()}
        _, filled = graph.step(
            np.array([text[:-1]]), [len(text) - 1], alone, np.zeros((1, 0), np.int64)
        )
        for name, value in filled.items():
            batch[name][number] = value[0]
    lengths = [len(text) for text in texts]
    last = np.array([[text[-1]] for text in texts])
    logits, _ = graph.step(last, lengths, batch, np.zeros((2, 1), np.int64))
    for number, text in enumerate(texts):
        assert np.abs(logits[number, 0] - graph.logits(text, len(text))[-1]).max() <= 1e-4


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4", "int2"])
def test_only_wanted_positions_get_logits(
    weights: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    graph = GraphSession(make_checkpoint(beta=3), weights, "int8-g64", tmp_path)
    ids = np.array([[3, 1, 4, 1, 5]])
    everything, _ = graph.step(ids, [5], graph.empty_cache(), np.arange(5)[None])
    some, _ = graph.step(ids, [5], graph.empty_cache(), np.array([[4, 1]]))
    none, cache = graph.step(ids, [5], graph.empty_cache(), np.zeros((1, 0), np.int64))
    assert np.abs(some - everything[:, [4, 1]]).max() <= 1e-2
    assert none.shape == (1, 0, 300)
    assert all(value[:, :, :5].any() for value in cache.values())


@pytest.mark.parametrize(
    ("weights", "bound"), [("fp16", 1e-4), ("int8", 4e-3), ("int4", 4e-3), ("int2", 4e-3)]
)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[8], DENSE[0]], ids=name_of)
def test_narrow_graph_is_the_network_with_rounded_weights(
    weights: str,
    bound: float,
    shape: dict[str, Any],
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    tokens: list[int],
) -> None:
    """What is left is float16 and MatMulNBits rounding its input: far less than a wrong wire."""
    codec = "none" if shape["beta"] == 8 else "int8-g64"
    graph = GraphSession(make_checkpoint(**shape), weights, codec, tmp_path)
    if weights != "fp16":
        round_matrices(graph.network, int(weights[3:]))
    assert divergence(graph.judged_logits(tokens), graph.logits(tokens, 24)) <= bound


def round_matrices(network: torch.nn.Module, bits: int) -> None:
    """Round all matrices of the graph as the exporter does; the table's stay as they are."""
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and ".memory." not in name:
            matrix = module.weight.numpy()
            block = block_for(matrix.shape[1], None)
            codes, scales = quantize(matrix, bits, block, np.dtype("float16"), name)
            rounded = dequantize(codes, scales, bits, matrix.shape[1])
            module.weight = torch.nn.Parameter(torch.from_numpy(rounded), requires_grad=False)


def divergence(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence in nats, by torch: not the exporter's own formula."""
    truth, found = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (truth, found))
    return float(torch.nn.functional.kl_div(found, truth, log_target=True, reduction="sum")) / len(
        truth
    )


def test_names_inputs_and_metadata(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    GraphSession(make_checkpoint(beta=3), "int4", "int8-g64", tmp_path)
    model = ir.load(tmp_path / GRAPH_FILE)
    caches = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert {value.name for value in model.graph.inputs} == {
        "token_index",
        "embedding",
        "memory_codes",
        "memory_scales",
        "memory_gain",
        "logits_index",
        "seqlens_k",
        "total_sequence_length",
        *caches,
    }
    outputs = [value.name for value in model.graph.outputs]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    assert dict(model.metadata_props) == {
        "edge_memllm.format_version": "1",
        "edge_memllm.identity": IDENTITY,
    }
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "/model/layers.1/self_attn/qkv_proj/MatMulNBits" in names
    assert "/lm_head/MatMulNBits" in names
    assert model.opset_imports == {"": 23, "com.microsoft": 1}


def test_dense_graph_has_no_memory_inputs(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    graph = GraphSession(make_checkpoint(beta=8), "int4", "none", tmp_path)
    assert not [v.name for v in graph.session.get_inputs() if v.name.startswith("memory")]


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_large_graph_puts_weights_into_one_file_beside_it(
    weights: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, tokens: list[int]
) -> None:
    inside, outside, again = (tmp_path / name for name in ("inside", "outside", "again"))
    for folder in (inside, outside, again):
        folder.mkdir()
    checkpoint = make_checkpoint(beta=2)
    graph = GraphSession(checkpoint, weights, "int4-g32", inside)
    expected = graph.logits(tokens, 24)
    source = Checkpoint.open(checkpoint)
    form = GraphForm(weights, graph.layout.codec, graph.layout.embedding_dtype)
    for folder in (outside, again):
        model = build_graph(source.spec, source.architecture.build, form, IDENTITY)
        assert save_graph(model, folder, self_contained_bytes=1000) == [GRAPH_FILE, EXTERNAL_FILE]
        assert sorted(file.name for file in folder.iterdir()) == [GRAPH_FILE, EXTERNAL_FILE]
    for name in (GRAPH_FILE, EXTERNAL_FILE):
        assert (outside / name).read_bytes() == (again / name).read_bytes()
    graph.session = onnxruntime.InferenceSession(
        outside / GRAPH_FILE, providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(graph.logits(tokens, 24), expected)


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ("fp16", 1e6, r"self_attn\.o_proj\.weight: a value is not finite in float16"),
        ("fp32", np.nan, r"self_attn\.o_proj\.weight: a value is not finite in float32"),
        ("int4", np.nan, r"o_proj\.weight: a weight between rows 0 and 64 is not finite or too"),
        ("int8", 1e8, r"too large for float16 scales"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    weights: str, value: float, message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = Checkpoint.open(make_checkpoint())
    weights_of = source.architecture.weights
    spoilt = weights_of["model.layers.1.self_attn.o_proj.weight"].clone()
    spoilt[5, 7] = value
    weights_of["model.layers.1.self_attn.o_proj.weight"] = spoilt
    form = GraphForm(weights, get_codec("f16"), "float16")
    with pytest.raises(ExportError, match=message):
        save_graph(build_graph(source.spec, source.architecture.build, form, IDENTITY), tmp_path)


def test_session_has_nothing_to_warn_about(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime speaks up for unused initialisers, wrong shapes and the like."""
    checkpoints = [make_checkpoint(**shape) for shape in SHAPES[:1] + SHAPES[7:8]]
    capfd.readouterr()  # transformers tells of what it writes
    for number, (checkpoint, codec) in enumerate(itertools.product(checkpoints, CODECS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        GraphSession(checkpoint, "int4", codec, folder).logits([1, 2, 3], 2)
    assert capfd.readouterr().err == ""
