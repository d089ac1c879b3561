"""GGUF files of every family become the network that they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from edge_memllm.errors import ExportError
from edge_memllm_export.sources.gguf_config import GGUFConfig
from edge_memllm_export.sources.gguf_file import GGUFFile
from support.gguf_files import (
    HEAD,
    INNER,
    KEYS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    built,
    metadata_of,
    permuted,
    random_model,
    rounded,
    stored_tensors,
    write_gguf,
)

F32 = GGMLQuantizationType.F32
QUERIES = "model.layers.1.self_attn.q_proj.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def llama3_factors() -> np.ndarray:
    """What llama.cpp's converter writes for `LLAMA3`, by its own loop."""
    factors = []
    for frequency in 1.0 / (500_000.0 ** (torch.arange(0, HEAD, 2).float() / HEAD)):
        wavelength = 2 * torch.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / 3.0
            factors.append(float(1 / ((1 - smooth) / 32.0 + smooth)))
    return np.array(factors, np.float32)


# Architecture, transformers' model type and fields, metadata, tensors besides.
NETWORKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {"tie_word_embeddings": False}, {}, {}),
    "llama, tied, with biases, linear": (
        "llama",
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LINEAR,
        },
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
    ),
    "llama 3": (
        "llama",
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {"llama.rope.freq_base": 500_000.0, "llama.rope.dimension_count": HEAD},
        {"rope_freqs.weight": llama3_factors()},
    ),
    "qwen2, yarn": (
        "qwen2",
        "qwen2",
        {"tie_word_embeddings": False, "rope_parameters": YARN},
        {
            "qwen2.rope.freq_base": 1e6,
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 1024,
        },
        {},
    ),
    "qwen3": ("qwen3", "qwen3", {"tie_word_embeddings": True}, {}, {}),
    "gemma 3": (
        "gemma3",
        "gemma3_text",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": HEAD,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        {
            "gemma3.rope.freq_base": 1e6,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 4.0,
            "gemma3.attention.sliding_window": 8,
            "gemma3.attention.sliding_window_pattern": np.array([True, False, True]),
        },
        {},
    ),
    "gemma 3, pattern of six": (
        "gemma3",
        "gemma3_text",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": HEAD,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            },
        },
        {
            "gemma3.rope.freq_base": 1e6,
            "gemma3.rope.freq_base_swa": 20_000.0,
            "gemma3.attention.sliding_window": 8,
            "gemma3.final_logit_softcapping": 30.0,
        },
        {},
    ),
}


def written(
    path: Path, network: str = "llama", kind: GGMLQuantizationType = F32, **changes: Any
) -> Any:
    """Write a network to `path` and return transformers' own."""
    architecture, model_type, fields, metadata, tensors = NETWORKS[network]
    model = random_model(model_type, rms_norm_eps=1e-6, **fields)
    write_gguf(
        path,
        architecture,
        metadata_of(architecture, **metadata, **changes),
        stored_tensors(architecture, model) | tensors,
        kind,
    )
    return model


def logits(model: Any) -> np.ndarray:
    tokens = torch.arange(2 * 40).reshape(2, 40) * 7 % VOCABULARY
    with torch.no_grad():
        return model(tokens).logits.numpy()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_computes_what_its_network_does(tmp_path: Path, network: str) -> None:
    expected = logits(written(tmp_path / "m.gguf", network))
    file = GGUFFile.open(tmp_path / "m.gguf")
    found = logits(built(file))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_compute_what_their_weights_say(tmp_path: Path, kind: str) -> None:
    path, stored = tmp_path / "m.gguf", GGMLQuantizationType[kind]
    expected = logits(rounded(written(path, kind=stored), stored))
    file = GGUFFile.open(path)
    assert np.array_equal(expected, logits(built(file)))
    assert file.kind(QUERIES) == kind
    assert file.kind("model.norm.weight") == "F32"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_rows_are_read_apart_and_the_grid_gives_them(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_memllm_export.sources.gguf_file._CHUNK", 5 * WIDTH)
    written(tmp_path / "m.gguf", kind=GGMLQuantizationType[kind])
    file = GGUFFile.open(tmp_path / "m.gguf")
    whole = file.read(QUERIES)
    assert whole.shape == file.shape(QUERIES) and whole.dtype == np.float32
    for start, stop in ((0, None), (3, 50), (17, 18), (9, 9)):
        part = file.read(QUERIES, start, stop)
        assert part.tobytes() == whole[start:stop].tobytes()
        grid = file.grid(QUERIES, start, stop)
        if kind == "F16":
            assert grid is None
        else:
            assert grid is not None and grid.kind == kind
            assert grid.weights().tobytes() == part.tobytes()
    assert file.grid("model.norm.weight") is None


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ4_XS"])
def test_large_blocks_are_read_as_the_library_reads_them(tmp_path: Path, kind: str) -> None:
    stored, wide = GGMLQuantizationType[kind], {"hidden_size": 256, "intermediate_size": 256}
    model = random_model("qwen3", **wide, num_hidden_layers=1, num_attention_heads=8)
    tensors, size = stored_tensors("qwen3", model), gguf.GGML_QUANT_SIZES[stored][1]
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            # Bytes below 60 are small float16 numbers wherever they stand.
            tensors[name] = rng.integers(0, 60, (len(tensor), size), dtype=np.uint8)
    sizes = ("embedding_length", "feed_forward_length")
    changes = {f"qwen3.{name}": 256 for name in sizes}
    changes |= {"qwen3.block_count": 1, "qwen3.attention.head_count": 8}
    path = tmp_path / "m.gguf"
    write_gguf(path, "qwen3", metadata_of("qwen3", **changes), tensors, stored)
    file = GGUFFile.open(path)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = dequantize(tensors["blk.0.ffn_down.weight"], stored)
    assert file.read(name).tobytes() == expected.tobytes()
    grid = file.grid(name)
    assert (grid is not None) == kind.startswith(("Q4", "Q5", "Q6"))
    assert grid is None or grid.weights().tobytes() == expected.tobytes()


def test_what_a_file_does_not_say_is_as_in_llama_cpp(tmp_path: Path) -> None:
    written(
        tmp_path / "m.gguf",
        **{
            "llama.rope.freq_base": None,
            "llama.attention.head_count": np.array([4] * LAYERS, np.int32),
            "llama.attention.value_length": None,
            "llama.rope.scaling.type": "none",
            "llama.expert_count": 0,
            "llama.unheard_of": "what the library does not know either",
        },
    )
    config = GGUFFile.open(tmp_path / "m.gguf").config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config["rms_norm_eps"] == 1e-6  # not what float32 makes of it
    assert config["num_attention_heads"] == 4
    assert config["max_position_embeddings"] == 4096


def test_a_file_without_a_tokenizer_has_no_text_files(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf")
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert file.tokenizer is None and file.text_files() == {}
    written(tmp_path / "n.gguf", **{"tokenizer.ggml.model": "none"})
    assert GGUFFile.open(tmp_path / "n.gguf").text_files() == {}


def test_a_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", tie_word_embeddings=False)
    tensors = stored_tensors("llama", model)
    tensors["blk.1.attn_q.weight"][5, 3] = np.nan
    tensors["blk.2.ffn_down.weight"][:] = 1e30
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", metadata_of("llama"), tensors)
    with pytest.raises(ExportError, match=r"blk.1.attn_q.weight holds what is no finite number"):
        GGUFFile.open(path).read(QUERIES)
    down = "model.layers.2.mlp.down_proj.weight"
    with np.errstate(all="ignore"):
        write_gguf(path, "llama", metadata_of("llama"), tensors, GGMLQuantizationType.Q8_0)
    file = GGUFFile.open(path)
    for read in (file.read, file.grid):
        with pytest.raises(ExportError, match=r"blk.2.ffn_down.weight holds what is no finite"):
            read(down)


def test_a_type_that_nobody_dequantises_is_refused_when_the_file_is_opened(tmp_path: Path) -> None:
    tensors = stored_tensors("llama", random_model("llama", tie_word_embeddings=False))
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = np.zeros((len(tensor), tensor.shape[1] // 32 * 40), np.uint8)
    kind = GGMLQuantizationType.Q8_1
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama"), tensors, kind)
    with pytest.raises(ExportError, match=r"is of type Q8_1, which the gguf library does not"):
        GGUFFile.open(path)


def network_of(architecture: str, metadata: dict[str, Any], **shapes: Any) -> GGUFConfig:
    """The configuration of a file of which only the head is looked at."""
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    model = random_model(model_type)
    found = {name: each.shape for name, each in stored_tensors(architecture, model).items()}
    found |= shapes
    found = {name: shape for name, shape in found.items() if shape is not None}
    factors = np.full(HEAD // 2, 3.0, np.float32) if "rope_freqs.weight" in found else None
    whole = {"general.architecture": architecture, **metadata_of(architecture), **metadata}
    return GGUFConfig(whole, found, factors, "m.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba', expected one of llama, qwen2, qwen3, gemma3"),
        ({"general.architecture": 3}, "general.architecture is 3"),
        ({"general.type": "adapter"}, "is of type 'adapter', expected a model"),
        ({"split.count": 3}, "is one of 3 parts of a model. Join them with llama-gguf-split"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, which the network here does not"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"llama.attention.causal": False}, "attends to what comes later"),
        ({"llama.block_count": 0}, "llama.block_count is 0, expected a whole number from 1"),
        ({"llama.block_count": True}, "llama.block_count is True, expected a whole number"),
        ({"llama.embedding_length": "64"}, "llama.embedding_length is '64', expected a whole"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "is nan, expected a number"),
        (
            {"llama.feed_forward_length": np.array([96, 64, 96])},
            "expected a whole number from 1 to 16777216, the same in all layers",
        ),
        ({"llama.attention.head_count_kv": 3}, "head_count is 4, expected a multiple of"),
        ({"llama.attention.value_length": 16}, "value_length is 16, expected 32, the width of"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16, expected 32"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type is 'longrope' with a factor of"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
            | {"llama.rope.scaling.yarn_ext_factor": 0.5},
            "yarn_ext_factor is not 1",
        ),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is not 1"),
    ],
)
def test_a_network_that_is_not_done_exactly_is_refused_by_name(
    metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=r"^m\.gguf: ") as caught:
        network_of("llama", metadata)
    assert message in str(caught.value)


def test_the_factor_of_old_files_is_linear() -> None:
    fields = network_of("llama", {"llama.rope.scale_linear": 2.0}).fields
    expected = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    assert fields["rope_parameters"] == expected


def test_two_scalings_at_once_are_refused() -> None:
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    message = r"has rope_freqs.weight besides a scaling of type 'linear'"
    with pytest.raises(ExportError, match=message):
        network_of("llama", scaling, **{"rope_freqs.weight": (HEAD // 2,)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"blk.1.attn_q.weight": None}, "has no tensor blk.1.attn_q.weight"),
        ({"token_embd.weight": None}, "has no tensor token_embd.weight"),
        ({"blk.0.ffn_up.weight": (INNER, 32)}, "has the shape [96, 32], expected [96, 64]"),
        ({"output_norm.weight": (1, WIDTH)}, "has the shape [1, 64], expected [64]"),
        ({"blk.0.attn_q_norm.weight": (HEAD,)}, "has the tensor 'blk.0.attn_q_norm.weight', which"),
        ({"blk.3.attn_norm.weight": (WIDTH,)}, "has the tensor 'blk.3.attn_norm.weight'"),
        ({"blk.0.attn_k.bias": (KEYS * HEAD,)}, "has the tensor 'blk.0.attn_k.bias'"),
        ({"rope_freqs.weight": (HEAD // 2,)}, "has factors that no form of Llama 3's gives"),
    ],
)
def test_a_file_whose_tensors_are_others_is_refused(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        network_of("llama", {}, **shapes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"gemma3.attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0"),
        ({"gemma3.attention.shared_kv_layers": 2}, "shared_kv_layers is 2"),
        ({"gemma3.attention.scale": 0.5}, "gemma3.attention.scale is 0.5, which the network"),
        (
            {"gemma3.rope.scaling.type": "yarn", "gemma3.rope.scaling.factor": 2.0},
            "is 'yarn' with a factor of 2.0, expected none, linear or (but in Gemma) yarn",
        ),
        (
            {"gemma3.attention.sliding_window": 8}
            | {"gemma3.attention.sliding_window_pattern": np.array([True])},
            "expected a number or 3 truth values",
        ),
    ],
)
def test_gemma_files_that_are_not_done_exactly_are_refused(
    metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError) as caught:
        network_of("gemma3", metadata)
    assert message in str(caught.value)


def test_gemma_without_a_window_sees_the_whole_text_in_all_layers() -> None:
    fields = network_of("gemma3", {"gemma3.attention.sliding_window": 0}).fields
    assert fields["layer_types"] == ["full_attention"] * LAYERS
    assert fields["query_pre_attn_scalar"] == HEAD


def test_the_largest_gemma_scales_attention_by_its_width_over_its_heads() -> None:
    shapes = {
        name.replace("blk.0", f"blk.{layer}"): tensor.shape
        for name, tensor in stored_tensors("gemma3", random_model("gemma3_text")).items()
        for layer in (range(62) if name.startswith("blk.0") else range(1))
    }
    metadata = metadata_of("gemma3", **{"gemma3.block_count": 62})
    whole = {"general.architecture": "gemma3", **metadata}
    assert GGUFConfig(whole, shapes, None, "m.gguf").fields["query_pre_attn_scalar"] == WIDTH // 4


def test_queries_are_put_back_in_order(tmp_path: Path) -> None:
    model = written(tmp_path / "m.gguf")
    weight = model.state_dict()[QUERIES].numpy()
    assert not np.array_equal(permuted(weight), weight)
    assert np.array_equal(GGUFFile.open(tmp_path / "m.gguf").read(QUERIES), weight)
