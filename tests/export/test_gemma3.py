"""Gemma 3, its text: folders of transformers and GGUF files, from export to tokens.

Networks with random weights climb the ladder in every switch; the judge is transformers' network
in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edge_memllm
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ExportError
from edge_memllm_export import export_model, verify_against
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import change_config, write_dense
from support.gguf_files import metadata_of, random_model, rounded, stored_tensors, write_gguf
from support.networks import greedy, greedy_of, judged, logits_of

KIND, WINDOW, LENGTH = "gemma3_text", 24, 100
EXACT: dict[str, Any] = {"graph_weights": "fp32", "accept_quality_loss": True}
PROMPT = "Norms before and after, windows in most layers, and two ways to turn an angle. "
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "linear": {"rope_parameters": LINEAR},
    "biases": {"attention_bias": True},
    "own scale": {"query_pre_attn_scalar": 24, "num_key_value_heads": 1},
    "own head": {"tie_word_embeddings": False},
    "pattern": {"layer_types": None, "num_hidden_layers": 7},
    "no window": {"sliding_window": 128},  # holds the whole context
    "odd heads": {"head_dim": 12},  # widened in the graph
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_climbs_the_ladder(switch: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, **SWITCHES[switch])
    report = export_model(checkpoint, tmp_path / "out", **EXACT)
    assert [rung for rung in report.rungs if not rung.ok] == []
    assert report.manifest.model.architecture == KIND


@pytest.mark.parametrize("switch", ["as it is", "linear", "own scale"])
def test_texts_beyond_the_window_are_as_in_transformers(switch: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, **SWITCHES[switch])
    export_model(checkpoint, tmp_path / "out", **EXACT)
    ids = np.random.default_rng(0).integers(0, 256, LENGTH).tolist()
    expected = logits_of(checkpoint, ids)
    with judged(tmp_path / "out", checkpoint) as artifact:
        for chunk in (LENGTH, 7, 1):
            found = np.concatenate(list(artifact.graph_logits(ids, chunk)))
            assert np.abs(found - expected).max() < 1e-4
    network = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with edge_memllm.load(tmp_path / "out", threads=1) as model:
        prompt = model.tokenizer.encode(PROMPT)
        assert len(prompt) > 2 * WINDOW
        assert greedy(model, prompt) == greedy_of(network, prompt)


def test_weights_in_bfloat16_are_computed_with_in_float32(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    network.save_pretrained(checkpoint)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    ids = np.random.default_rng(1).integers(0, 256, LENGTH).tolist()
    expected = logits_of(checkpoint, ids)
    with judged(tmp_path / "out", checkpoint) as artifact:
        assert np.abs(next(artifact.reference.logits(ids, LENGTH)) - expected).max() < 1e-5
        assert np.abs(next(artifact.graph_logits(ids, LENGTH)) - expected).max() < 1e-4


def test_the_reference_behind_the_contract_computes_the_same(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    ids = np.random.default_rng(2).integers(0, 256, LENGTH).tolist()
    with (
        judged(tmp_path / "out", checkpoint) as artifact,
        Feeder(artifact.reference.runtime(), artifact.table, 1, 7) as feeder,
    ):
        parts = [np.array(feeder.score(0, ids[at : at + 7])) for at in range(0, LENGTH, 7)]
    assert np.abs(np.concatenate(parts) - logits_of(checkpoint, ids)).max() < 1e-4


def test_embeddings_of_the_table_are_scaled_as_in_transformers(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    network = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = np.arange(300)
    expected = network.model.embed_tokens(torch.from_numpy(ids)).detach().numpy()
    with judged(tmp_path / "out", checkpoint) as artifact:
        assert np.array_equal(artifact.table.embeddings(ids), expected)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_sums_beyond_float16_are_no_matter(weights: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("post_feedforward_layernorm.weight"):
            tensors[name] = (1 + tensor) * 3e4 - 1  # which float16 holds, but not a sum of such
    save_file(tensors, file, {"format": "pt"})
    report = export_model(
        checkpoint,
        tmp_path / "out",
        graph_weights=weights,
        kv_dtype="int8",
        accept_quality_loss=True,
    )
    assert report.quality is not None
    assert report.quality.mean_kl < {"fp16": 0.01, "int8": 0.02, "int4": 0.5}[weights]


def test_windows_are_in_the_manifest(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, **SWITCHES["pattern"])
    report = export_model(checkpoint, tmp_path / "out", **EXACT)
    windows = [each.window for each in report.manifest.model.caches]
    assert windows == [WINDOW] * 5 + [None] + [WINDOW]


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_the_text_is_taken(prefix: str, tmp_path: Path) -> None:
    text = write_dense(tmp_path / "text", KIND, tie_word_embeddings=True)
    seeing = with_vision(write_dense(tmp_path / "seeing", KIND, tie_word_embeddings=True), prefix)
    report = export_model(seeing, tmp_path / "out", **EXACT)
    assert report.notes[0].startswith("vision_tower, multi_modal_projector: left out")
    assert report.manifest.model.architecture == KIND
    assert report.manifest.model.eos_token_ids == (257, 258)
    assert report.manifest.model.identity == Checkpoint.open(text).identity()
    assert verify_against(tmp_path / "out", text)[3].ok


def with_vision(checkpoint: Path, prefix: str) -> Path:
    """Make the folder that of a model with a part that sees, its text below `prefix`."""
    where = checkpoint / "config.json"
    fields = json.loads(where.read_text())
    ids = {name: fields.pop(name) for name in ("eos_token_id", "bos_token_id")}
    whole = {"model_type": "gemma3", "text_config": fields, "vision_config": {}, **ids}
    where.write_text(json.dumps(whole))
    (checkpoint / "generation_config.json").unlink()
    file = checkpoint / "model.safetensors"
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in load_file(file).items()
    }
    tower = prefix.removesuffix("language_model.").removesuffix("language_model.model.")
    tensors[f"{tower}vision_tower.encoder.weight"] = torch.zeros(2, 2)
    tensors[f"{tower}multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(2)
    save_file(tensors, file, {"format": "pt"})
    return checkpoint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_activation": "gelu"},
            "hidden_activation is 'gelu', expected 'gelu_pytorch_tanh'",
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, expected None"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, expected None"),
        ({"use_bidirectional_attention": True}, "attends to what comes later"),
        (
            {"rope_parameters": {**LINEAR, "sliding_attention": DYNAMIC}},
            "rope_type is 'dynamic', expected one of default, linear, llama3, yarn",
        ),
    ],
    ids=str,
)
def test_what_the_graph_does_not_compute_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    change_config(checkpoint, **fields)
    with pytest.raises(ExportError, match=message) as refused:
        export_model(checkpoint, tmp_path / "out")
    assert str(checkpoint / "config.json") in str(refused.value)


def sentencepiece_tokens(size: int) -> dict[str, Any]:
    """A tokenizer's metadata: special tokens, letters, bytes, words, and tokens without use."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    spelled = [*special, "\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "the"]
    spelled += [f"<0x{byte:02X}>" for byte in range(256)]
    spelled += [f"<unused{number}>" for number in range(size - len(spelled) - 1)]
    spelled.append("<end_of_turn>")
    types = gguf.TokenType
    kinds = [types.CONTROL] * 4 + [types.NORMAL] * (len(spelled) - 5) + [types.CONTROL]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": spelled,
        "tokenizer.ggml.token_type": np.array(
            [
                types.BYTE if token.startswith("<0x") else kind
                for token, kind in zip(spelled, kinds, strict=True)
            ],
            np.int32,
        ),
        "tokenizer.ggml.scores": -np.arange(len(spelled), dtype=np.float32),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


GGUF_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Blocks of 256, which the library reads and does not write: where their float16 numbers lie.
LARGE_BLOCKS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
GGUF_SIZES = {
    "context_length": 512,
    "embedding_length": 256,
    "feed_forward_length": 256,
    "block_count": 7,  # the file does not say which sees the whole text: the sixth
    "attention.head_count": 8,
    "attention.sliding_window": WINDOW,
    "rope.freq_base": 1e6,
}


@pytest.mark.parametrize("name", [*GGUF_TYPES, *LARGE_BLOCKS])
def test_a_gguf_file_becomes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    network = random_model(
        KIND,
        vocab_size=320,
        max_position_embeddings=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=7,
        num_attention_heads=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
    )
    blocks = random_blocks(network, kind) if name in LARGE_BLOCKS else {}
    tensors = stored_tensors("gemma3", network) | blocks
    sizes = {f"gemma3.{key}": value for key, value in GGUF_SIZES.items()}
    metadata = metadata_of("gemma3", **sizes) | sentencepiece_tokens(320)
    file = write_gguf(tmp_path / "model.gguf", "gemma3", metadata, tensors, kind)
    report = export_model(file, tmp_path / "out", **EXACT)
    assert [rung for rung in report.rungs if not rung.ok] == []
    assert report.manifest.model.eos_token_ids == (1, 319)
    network = network if blocks else rounded(network, kind)
    with edge_memllm.load(tmp_path / "out", threads=1) as model:
        prompt = model.tokenizer.encode("the file has it all, and more than a window of it")
        assert prompt[0] == 2
        assert greedy(model, prompt, 16) == greedy_of(network, prompt, 16)
    ids = np.random.default_rng(3).integers(0, 320, LENGTH).tolist()
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits[0].numpy()
    with judged(tmp_path / "out", file) as artifact:
        found = next(artifact.graph_logits(ids, LENGTH))
    assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def random_blocks(network: Any, kind: gguf.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """Blocks for every matrix, by the file's names; they become the network's weights."""
    rng, size = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[kind][1]
    drawn: dict[int, np.ndarray] = {}
    for parameter in network.parameters():
        if parameter.ndim == 2:
            raw = rng.integers(0, 256, (len(parameter), size), dtype=np.uint8)
            for at in LARGE_BLOCKS[kind.name]:
                raw[:, at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
            parameter.data = torch.from_numpy(dequantize(raw, kind))
            drawn[parameter.data_ptr()] = raw
    named = stored_tensors("gemma3", network).items()
    return {name: drawn[tensor.ctypes.data] for name, tensor in named if tensor.ndim == 2}
