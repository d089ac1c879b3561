"""Files of Gemma 4 and Gemma 3n become the network that they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from edge_memllm.errors import ExportError
from edge_memllm_export.sources.gguf_config import GGUFConfig
from edge_memllm_export.sources.gguf_file import GGUFFile
from support.gguf_files import built, rounded, write_gguf
from support.gguf_gemma import (
    FORMS,
    FULL,
    SLIDING,
    VOCABULARY,
    WIDTH,
    WINDOW,
    gemma3n,
    gemma3n_metadata,
    gemma3n_tensors,
    gemma4,
    gemma4_metadata,
    gemma4_tensors,
)


def written(path: Path, form: str, kind: str = "F32", **fields: Any) -> Any:
    """Write a network to `path` and return transformers' own, its matrices as `kind` has them."""
    network, stored = gemma4(form, **fields), GGMLQuantizationType[kind]
    write_gguf(path, "gemma4", gemma4_metadata(network.config), gemma4_tensors(network), stored)
    return rounded(network, stored)


def logits(model: Any) -> np.ndarray:
    tokens = torch.arange(2 * 3 * WINDOW).reshape(2, -1) * 37 % VOCABULARY
    with torch.no_grad():
        return model(tokens).logits.numpy()


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_computes_what_its_network_does(tmp_path: Path, form: str, kind: str) -> None:
    expected = logits(written(tmp_path / "m.gguf", form, kind))
    found = logits(built(GGUFFile.open(tmp_path / "m.gguf")))
    assert np.array_equal(found, expected)


def test_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    network = written(tmp_path / "m.gguf", "E4B", tie_word_embeddings=False)
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert file.config["tie_word_embeddings"] is False
    assert np.array_equal(logits(built(file)), logits(network))


def config_of(form: str, shapes: dict[str, Any] | None = None, **metadata: Any) -> GGUFConfig:
    """The configuration of a file of which only the head is looked at."""
    network = gemma4(form)
    tensors = gemma4_tensors(network)
    found = {name: each.shape for name, each in tensors.items()} | (shapes or {})
    found = {name: shape for name, shape in found.items() if shape is not None}
    changes = {f"gemma4.{name}": value for name, value in metadata.items()}
    whole = {"general.architecture": "gemma4", **gemma4_metadata(network.config, **changes)}
    factors = tensors["rope_freqs.weight"] if "rope_freqs.weight" in found else None
    return GGUFConfig(whole, found, factors, "m.gguf")


def test_what_a_file_does_not_say_is_as_in_llama_cpp() -> None:
    """Checked against llama.cpp's own logits of files without these keys."""
    unsaid = {"final_logit_softcapping": None, "rope.freq_base_swa": None}
    fields = config_of("E2B", **unsaid).fields
    assert fields["final_logit_softcapping"] == 30.0
    assert fields["rope_parameters"][SLIDING]["rope_theta"] == 10_000.0
    assert config_of("E2B", final_logit_softcapping=0.0).fields["final_logit_softcapping"] is None


def test_keys_and_values_that_nobody_reads_are_left_alone() -> None:
    idle = {"blk.4.attn_k.weight": (32, WIDTH), "blk.5.attn_k_norm.weight": (64,)}
    assert not {each.tensor for each in config_of("E2B", idle).tensors.values()} & idle.keys()
    with pytest.raises(ExportError, match=r"has the tensor 'blk.6.attn_k.weight', which no gemma4"):
        config_of("E2B", {"blk.6.attn_k.weight": (32, WIDTH)})


@pytest.mark.parametrize(
    ("form", "metadata", "message"),
    [
        ("E2B", {"expert_count": 128}, "gemma4.expert_count is 128: mixtures of experts such as"),
        ("E2B", {"attention.scale": 0.5}, "gemma4.attention.scale is 0.5, which the network here"),
        ("E2B", {"rope.scaling.type": "linear"}, "rope.scaling.type is 'linear', which"),
        ("E2B", {"attention.sliding_window_pattern": 3}, "expected 6 truth values, the last one"),
        (
            "E2B",
            {"attention.sliding_window_pattern": np.array([True] * 6)},
            "expected 6 truth values, the last one false",
        ),
        ("E2B", {"attention.shared_kv_layers": 4}, "is 4, which leaves none whose keys and values"),
        ("E2B", {"attention.shared_kv_layers": 7}, "shared_kv_layers is 7, which leaves none"),
        ("E2B", {"attention.value_length": 32}, "value_length is 32, expected 64, as attention"),
        ("E2B", {"rope.dimension_count_swa": 16}, "rope.dimension_count_swa is 16, expected 32"),
        (
            "E2B",
            {"feed_forward_length": np.array([96, 96, 96, 192, 192, 96])},
            "expected one width, or twice it in the last 3 layers",
        ),
        ("E2B", {"feed_forward_length": np.array([96, 0])}, "expected 6 whole numbers, one for"),
        (
            "E2B",
            {"attention.head_count_kv": np.array([1, 1, 2, 1, 1, 2])},
            "expected one number, or where keys are values one for each type of layer",
        ),
        ("31B", {"attention.head_count_kv": 3}, "head_count is 4, expected a multiple of"),
        ("E2B", {"attention.sliding_window": 0}, "attention.sliding_window is 0, expected a whole"),
        ("E2B", {"rope.freq_base": None}, "gemma4.rope.freq_base is None, expected a number"),
    ],
)
def test_a_network_that_is_not_done_exactly_is_refused_by_name(
    form: str, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=r"^m\.gguf: ") as caught:
        config_of(form, **metadata)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"rope_freqs.weight": None}, "has no tensor rope_freqs.weight"),
        ({"per_layer_token_embd.weight": None}, "has no tensor per_layer_token_embd.weight"),
        ({"per_layer_token_embd.weight": (VOCABULARY, 32)}, "has the shape [300, 32], expected"),
        ({"blk.0.layer_output_scale.weight": None}, "has no tensor blk.0.layer_output_scale"),
        ({"blk.4.ffn_up.weight": (96, WIDTH)}, "has the shape [96, 64], expected [192, 64]"),
        ({"blk.0.ffn_gate_inp.weight": (8, WIDTH)}, "has the tensor 'blk.0.ffn_gate_inp.weight'"),
    ],
)
def test_a_file_whose_tensors_are_others_is_refused(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        config_of("E2B", shapes)
    assert message in str(caught.value)


@pytest.mark.parametrize("factors", [[1, 1, 2, 1e30], [1e30, 1, 1, 1e30], [1.0] * 4])
def test_factors_of_no_proportional_form_are_refused(factors: list[float]) -> None:
    network = gemma4("E2B")
    shapes = {name: each.shape for name, each in gemma4_tensors(network).items()}
    whole = {"general.architecture": "gemma4", **gemma4_metadata(network.config)}
    with pytest.raises(ExportError, match=r"rope_freqs.weight has other factors than 32, the"):
        GGUFConfig(whole, shapes, np.array(factors, np.float32), "m.gguf")


def test_the_part_that_turns_is_as_the_factors_say() -> None:
    rotary = config_of("E2B").fields["rope_parameters"]
    expected = {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    }
    assert rotary[FULL] == expected


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_file_of_gemma_3n_computes_what_its_network_does(tmp_path: Path, kind: str) -> None:
    network, stored = gemma3n(), GGMLQuantizationType[kind]
    # Coefficients of four streams are no whole blocks; llama.cpp leaves those as they are.
    narrow = {
        f"blk.{layer}.altup_{name}_coef.weight": GGMLQuantizationType.F32
        for layer in range(6)
        for name in ("correct", "predict")
    }
    metadata, tensors = gemma3n_metadata(network.config), gemma3n_tensors(network)
    write_gguf(tmp_path / "m.gguf", "gemma3n", metadata, tensors, stored, narrow)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2 and "_coefs" not in name:
                weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), stored), stored)))
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert file.config["activation_sparsity_pattern"] == [0.95, 0.95, 0.0, 0.0, 0.0, 0.0]
    assert file.shape("model.altup_projections.2.weight") == (WIDTH, WIDTH)
    assert np.array_equal(logits(built(file)), logits(network))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"activation_sparsity_scale": None}, "activation_sparsity_scale is None, expected 6"),
        ({"altup.active_idx": 4}, "altup.active_idx is 4, expected a whole number from 0 to 3"),
        ({"attention.key_length_swa": 16}, "gemma3n.attention.key_length_swa is 16, which the"),
        ({"rope.dimension_count": 16}, "rope.dimension_count is 16, expected 32, the width of"),
        ({"attention.shared_kv_layers": 5}, "shared_kv_layers is 5, which leaves none whose"),
    ],
)
def test_gemma_3n_that_is_not_done_exactly_is_refused_by_name(
    metadata: dict[str, Any], message: str
) -> None:
    network = gemma3n()
    shapes = {name: each.shape for name, each in gemma3n_tensors(network).items()}
    changes = {f"gemma3n.{name}": value for name, value in metadata.items()}
    whole = {"general.architecture": "gemma3n", **gemma3n_metadata(network.config, **changes)}
    with pytest.raises(ExportError, match=r"^m\.gguf: ") as caught:
        GGUFConfig(whole, shapes, None, "m.gguf")
    assert message in str(caught.value)
