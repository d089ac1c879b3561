"""Gemma 4, its text: rows as gates, keys and values read twice, from a folder to tokens.

Networks with random weights climb the ladder in every switch; the judge is transformers' network
in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edge_memllm
from edge_memllm import Sampling
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ExportError
from edge_memllm_export import export_model, verify_against
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from support.checkpoints import change_config, write_dense

KIND, LENGTH, LAYERS, ROW = "gemma4_text", 100, 7, 32
EXACT: dict[str, Any] = {
    "graph_weights": "fp32",
    "table_codec": "f32",
    "accept_quality_loss": True,
}
GREEDY = Sampling(temperature=0.0)
PROMPT = "Rows of their own for every layer, and keys and values that are read more than once. "
NO_ROWS = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
}
# Errors of random layers add up as those of trained ones do not.
SHALLOW = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "nothing shared": {"num_kv_shared_layers": 0},
    "no rows, keys as values": NO_ROWS,
    "no cap": {"final_logit_softcapping": None},
    "odd heads": {"head_dim": 12, "global_head_dim": 24},
    "no window": {"sliding_window": 128},
}


def network_of(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def logits_of(checkpoint: Path, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of transformers' own network, in float32."""
    with torch.inference_mode():
        logits: np.ndarray = network_of(checkpoint)(torch.tensor([ids])).logits[0].numpy()
    return logits


def judged(artifact: Path, checkpoint: Path) -> JudgedArtifact:
    return JudgedArtifact(artifact, Checkpoint.open(checkpoint).architecture.reference())


def greedy(model: Any, prompt: list[int], **options: Any) -> list[int]:
    options = {"max_new_tokens": 40, "sampling": GREEDY, "ignore_eos": True, **options}
    return [piece.token for piece in model.stream(prompt, **options)]


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_climbs_the_ladder(switch: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, **SWITCHES[switch])
    report = export_model(checkpoint, tmp_path / "out", **EXACT)
    assert [rung for rung in report.rungs if not rung.ok] == []


@pytest.mark.parametrize("switch", ["as it is", "no rows, keys as values", "odd heads"])
def test_texts_beyond_the_window_are_as_in_transformers(switch: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, **SWITCHES[switch])
    export_model(checkpoint, tmp_path / "out", **EXACT)
    ids = np.random.default_rng(0).integers(0, 256, LENGTH).tolist()
    expected = logits_of(checkpoint, ids)
    with judged(tmp_path / "out", checkpoint) as artifact:
        for chunk in (LENGTH, 7, 1):
            found = np.concatenate(list(artifact.graph_logits(ids, chunk)))
            assert np.abs(found - expected).max() < 1e-4
    network = network_of(checkpoint)
    with edge_memllm.load(tmp_path / "out", threads=1) as model:
        prompt = model.tokenizer.encode(PROMPT)
        found = network.generate(
            torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False
        )
        assert greedy(model, prompt) == found[0, len(prompt) :].tolist()


def test_a_ragged_batch_is_as_each_text_alone(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 256, length).tolist() for length in (60, 31, 9)]
    expected = [logits_of(checkpoint, ids) for ids in texts]
    with (
        judged(tmp_path / "out", checkpoint) as artifact,
        Feeder(artifact.runtime, artifact.table, len(texts), 16) as feeder,
    ):
        for sequence, ids in enumerate(texts):
            last = feeder.prefill(sequence, ids[:-4])
            assert np.abs(last - expected[sequence][-5]).max() < 1e-4
        for place in range(-4, 0):
            found = feeder.decode([ids[place] for ids in texts])
            for sequence, logits in enumerate(expected):
                assert np.abs(found[sequence] - logits[place]).max() < 1e-4


def test_prompts_whose_logits_nobody_wants_are_no_matter(tmp_path: Path) -> None:
    """Layers that keep nothing are left out there, and what follows is the same."""
    checkpoint = write_dense(tmp_path / "dense", KIND)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    ids = np.random.default_rng(2).integers(0, 256, LENGTH).tolist()
    expected = logits_of(checkpoint, ids)
    with (
        judged(tmp_path / "out", checkpoint) as artifact,
        Feeder(artifact.runtime, artifact.table, 1, 32) as feeder,
    ):
        feeder.skip(0, ids[:40])
        last = feeder.prefill(0, ids[40:80])
        assert np.abs(last - expected[79]).max() < 1e-4
        found = feeder.verify(ids[80:85])  # as drafts are
        assert np.abs(found - expected[80:85]).max() < 1e-4


def test_the_reference_behind_the_contract_computes_the_same(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    export_model(checkpoint, tmp_path / "out", **EXACT)
    ids = np.random.default_rng(3).integers(0, 256, LENGTH).tolist()
    with judged(tmp_path / "out", checkpoint) as artifact:
        parts = reference_logits(artifact, ids, None)
        assert np.abs(parts - logits_of(checkpoint, ids)).max() < 1e-4
        gain = np.linspace(0.0, 2.0, LAYERS).tolist()
        gained = reference_logits(artifact, ids, gain)
        with Feeder(artifact.runtime, artifact.table, 1, LENGTH, memory_gain=gain) as feeder:
            found = np.array(feeder.score(0, ids))
    assert np.abs(gained - parts).max() > 1  # behind the norm a gain is felt
    assert np.abs(found - gained).max() < 1e-4


def reference_logits(
    artifact: JudgedArtifact, ids: list[int], gain: list[float] | None
) -> np.ndarray:
    runtime = artifact.reference.runtime()
    with Feeder(runtime, artifact.table, 1, 7, memory_gain=gain) as feeder:
        parts = [np.array(feeder.score(0, ids[at : at + 7])) for at in range(0, LENGTH, 7)]
    return np.concatenate(parts)


def test_the_table_holds_what_transformers_looks_up(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    report = export_model(checkpoint, tmp_path / "out", **EXACT)
    network = network_of(checkpoint).model
    ids = np.arange(300)
    embeddings = network.embed_tokens(torch.from_numpy(ids)).detach().numpy()
    rows = network.get_per_layer_inputs(torch.from_numpy(ids)[None])[0].detach().numpy()
    with judged(tmp_path / "out", checkpoint) as artifact:
        assert np.array_equal(artifact.table.embeddings(ids), embeddings)
        assert np.array_equal(artifact.table.rows(ids), rows)
    model = report.manifest.model
    assert model.memory == MemorySpec(LAYERS, ROW, "gate", (1.0,) * LAYERS)
    assert [each.readers for each in model.caches] == [(), (), (4, 5), (6,)]
    assert [each.rolling for each in model.caches] == [True, False, False, False]
    shapes = [(each.layer, each.kv_heads, each.head_dim, each.window) for each in model.caches]
    assert shapes == [(0, 1, 16, 24), (1, 1, 32, None), (2, 1, 16, 24), (3, 1, 32, None)]


def test_factors_of_embeddings_are_rounded_as_the_checkpoint_is(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    network.save_pretrained(checkpoint)
    ids = np.arange(300)
    rows = Checkpoint.open(checkpoint).architecture.reference().rows()
    factor = float(torch.tensor(48**0.5).bfloat16())
    assert factor != pytest.approx(48**0.5, rel=1e-4)
    plain = network.model.embed_tokens.weight.float().detach().numpy()
    assert np.array_equal(rows.embeddings(ids), plain * np.float32(factor))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_few_bits_lose_little(weights: str, kv_dtype: str | None, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, **SHALLOW)
    report = export_model(
        checkpoint,
        tmp_path / "out",
        graph_weights=weights,
        kv_dtype=kv_dtype,
        accept_quality_loss=True,
    )
    assert report.quality is not None
    bound = {"fp16": 1e-3, "int8": 0.02, "int4": 0.4}[weights]
    assert report.quality.mean_kl < (bound if kv_dtype is None else bound + 2e-3)


@pytest.mark.parametrize("reader", ["pread", "direct", "uring", "mmap", "ram"])
def test_streamed_is_resident_bit_for_bit(reader: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    export_model(checkpoint, tmp_path / "out", graph_weights="int8", accept_quality_loss=True)
    ids = np.random.default_rng(4).integers(0, 256, 40).tolist()
    found = []
    for each in ("ram", reader):
        with edge_memllm.load(tmp_path / "out", reader=each, threads=1) as model:
            with Feeder(model.runtime, model.table, 1, 16) as feeder:
                logits = [np.array(feeder.score(0, ids[at : at + 16])) for at in (0, 16)]
            found.append(np.concatenate(logits))
    assert np.array_equal(*found)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_the_text_is_taken(prefix: str, tmp_path: Path) -> None:
    text = write_dense(tmp_path / "text", KIND)
    seeing = with_others(write_dense(tmp_path / "seeing", KIND), prefix)
    report = export_model(seeing, tmp_path / "out", **EXACT)
    assert report.notes[0].startswith("vision_tower, embed_vision, audio_tower, embed_audio: left")
    assert report.manifest.model.architecture == KIND
    assert report.manifest.model.identity == Checkpoint.open(text).identity()
    assert verify_against(tmp_path / "out", text)[3].ok


def with_others(checkpoint: Path, prefix: str) -> Path:
    """Make the folder that of a model which sees and hears, its text below `prefix`.

    It carries, too, what its layers would need that read other layers' keys and values.
    """
    where = checkpoint / "config.json"
    fields = json.loads(where.read_text())
    ids = {name: fields.pop(name) for name in ("eos_token_id", "bos_token_id")}
    where.write_text(json.dumps({"model_type": "gemma4", "text_config": fields, **ids}))
    file = checkpoint / "model.safetensors"
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in load_file(file).items()
    }
    for name in ("k_proj", "v_proj", "k_norm"):
        tensors[f"{prefix}layers.5.self_attn.{name}.weight"] = torch.zeros(2, 2)
    above = "model." if prefix.startswith("model.") else ""
    for name in ("vision_tower.a", "embed_vision.b", "audio_tower.c", "embed_audio.d"):
        tensors[f"{above}{name}.weight"] = torch.zeros(2, 2)
    save_file(tensors, file, {"format": "pt"})
    return checkpoint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected"),
        ({"enable_moe_block": True, "num_experts": 8}, "choose among 8 experts \\(MoE"),
        ({"use_bidirectional_attention": "all"}, "attends to what comes later"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input is 100"),
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


def test_a_context_can_be_cut(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND)
    whole = export_model(checkpoint, tmp_path / "whole", **EXACT)
    cut = export_model(checkpoint, tmp_path / "cut", context=64, **EXACT)
    sizes = [each.manifest.files["graph.onnx"].bytes for each in (whole, cut)]
    assert cut.manifest.model.max_position_embeddings == 64
    assert cut.manifest.model.identity == whole.manifest.model.identity
    assert sizes[0] - sizes[1] == pytest.approx(64 * (16 + 32) * 4, rel=0.01)
    assert verify_against(tmp_path / "cut", checkpoint)[3].ok
    with pytest.raises(ExportError, match=r"context 129: .* is for 128 positions"):
        export_model(checkpoint, tmp_path / "more", context=129, **EXACT)


def test_tables_of_angles_cut_a_long_context_by_default(tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", KIND, max_position_embeddings=1 << 20)
    report = export_model(checkpoint, tmp_path / "out", graph_weights="fp16", verify=False)
    assert report.manifest.model.max_position_embeddings == 1 << 18
    assert "context: 262,144 of the model's 1,048,576 positions" in " ".join(report.notes)
