"""Dense networks of the llama family, from a folder or a GGUF file to tokens.

Networks with random weights climb the ladder in every switch of the family; a real file is tried
where EDGE_MEMLLM_REAL_GGUF names that of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.cli.main import main
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ExportError
from edge_memllm_export import export_model, verify_against
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import change_config, write_dense
from support.gguf_files import (
    byte_tokens,
    metadata_of,
    random_model,
    rounded,
    stored_tensors,
    write_gguf,
)
from support.networks import greedy, greedy_of

EXACT = {"graph_weights": "fp32", "accept_quality_loss": True}
REAL = os.environ.get("EDGE_MEMLLM_REAL_GGUF", "")
THETA = {"rope_theta": 1e4}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# Qwen looks at a window in some layers only.
SOME_LAYERS = ["full_attention", "sliding_attention", "full_attention"]

SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # Llama 3's scaling, a head of its own
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "all heads": ("llama", {"num_key_value_heads": 4, "head_dim": None}),
    "linear": ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 2.0}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "some windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "layer_types": SOME_LAYERS},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_computes_what_transformers_does(switch: str, tmp_path: Path) -> None:
    kind, fields = SWITCHES[switch]
    checkpoint = write_dense(tmp_path / "dense", kind, **fields)
    report = export_model(checkpoint, tmp_path / "out", **EXACT)
    assert [rung for rung in report.rungs if not rung.ok] == []
    assert (report.manifest.model.architecture, report.manifest.model.memory) == (
        kind,
        MemorySpec(),
    )
    network = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with edge_memllm.load(tmp_path / "out", threads=1) as model:
        prompt = model.tokenizer.encode("Heads are grouped, angles turn, and windows end. ")
        assert greedy(model, prompt) == greedy_of(network, prompt)


@pytest.mark.parametrize(
    ("switch", "weights"),
    [("window", "int8"), ("some windows", "int4"), ("qwen3", "fp16"), ("qwen3", "int4")],
)
def test_forms_of_few_bits_are_calibrated_on_the_network(
    switch: str, weights: str, tmp_path: Path
) -> None:
    kind, fields = SWITCHES[switch]
    checkpoint = write_dense(tmp_path / "dense", kind, dtype="bfloat16", **fields)
    report = export_model(
        checkpoint,
        tmp_path / "out",
        graph_weights=weights,
        graph_method=None if weights == "fp16" else "gptq",
        kv_dtype="int8",
        accept_quality_loss=True,
    )
    assert report.quality is not None
    assert report.quality.mean_kl < {"fp16": 0.01, "int8": 0.02, "int4": 0.5}[weights]


def test_windows_are_in_the_manifest(tmp_path: Path) -> None:
    kind, fields = SWITCHES["some windows"]
    export_model(write_dense(tmp_path / "dense", kind, **fields), tmp_path / "out", **EXACT)
    with Artifact.open(tmp_path / "out") as artifact:
        assert [each.window for each in artifact.manifest.model.caches] == [None, 24, None]


def test_the_reference_behind_the_contract_forgets_what_a_window_hides(tmp_path: Path) -> None:
    kind, fields = SWITCHES["window"]
    checkpoint = write_dense(tmp_path / "dense", kind, **fields)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    reference = Checkpoint.open(checkpoint).architecture.reference()
    ids = np.random.default_rng(0).integers(0, 256, 60).tolist()
    whole = next(reference.logits(ids, len(ids)))
    with (
        edge_memllm.load(tmp_path / "out", threads=1) as model,
        Feeder(reference.runtime(), model.table, 1, 7) as feeder,
    ):
        parts = [np.array(feeder.score(0, ids[at : at + 7])) for at in range(0, 60, 7)]
    assert np.abs(np.concatenate(parts) - whole).max() < 1e-3  # embeddings are exact here


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        (
            "llama",
            {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic', expected one of default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}},
            "turns a part of each head only",
        ),
    ],
    ids=str,
)
def test_what_the_graph_does_not_compute_is_refused(
    kind: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind)
    change_config(checkpoint, **fields)
    with pytest.raises(ExportError, match=message) as refused:
        export_model(checkpoint, tmp_path / "out")
    assert str(checkpoint / "config.json") in str(refused.value)


def test_weights_that_are_not_the_configurations_are_refused(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", "llama")
    change_config(checkpoint, attention_bias=True)
    with pytest.raises(ExportError, match=r"lacks the weight model.layers.0.self_attn.k_proj.bias"):
        export_model(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "F32"), ("llama", "Q4_1"), ("qwen2", "F16"), ("qwen3", "Q8_0")],
)
def test_a_gguf_file_becomes_what_transformers_computes(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    network = random_model(architecture, vocab_size=258, max_position_embeddings=512)
    tensors = stored_tensors(architecture, network)
    metadata = metadata_of(architecture, **{f"{architecture}.context_length": 512}) | byte_tokens()
    file = write_gguf(tmp_path / "model.gguf", architecture, metadata, tensors, stored)
    report = export_model(file, tmp_path / "out", **EXACT)
    assert [rung for rung in report.rungs if not rung.ok] == []
    assert report.manifest.model.eos_token_ids == (257,)
    assert verify_against(tmp_path / "out", file)[3].ok
    network = rounded(network, stored)
    with edge_memllm.load(tmp_path / "out", threads=1) as model:
        prompt = model.tokenizer.encode("the file has it all")
        assert prompt[0] == 256
        assert greedy(model, prompt, 16) == greedy_of(network, prompt, 16)


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"something else")
    with pytest.raises(ExportError, match=r"model\.bin"):
        export_model(file, tmp_path / "out")


@pytest.mark.skipif(not Path(REAL).is_file(), reason="EDGE_MEMLLM_REAL_GGUF names no file")
def test_a_real_model_knows_the_capital_of_france(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = export_model(REAL, tmp_path / "out", graph_weights="fp16")
    assert report.quality is not None
    assert report.quality.perplexity_increase < 0.003
    question = ["--prompt", "What is the capital of France?", "--greedy", "--max-new-tokens", "12"]
    assert main(["run", str(tmp_path / "out"), *question]) == 0
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."
