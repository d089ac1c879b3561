"""Gemma 3n and 4, their text: rows as gates, keys and values read twice, from a folder to tokens.

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
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.engine.feeding import Feeder
from edge_memllm_export import export_model, verify_against
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from support.checkpoints import write_dense
from support.networks import greedy, greedy_of, judged, logits_of, network_of

KINDS = ("gemma3n_text", "gemma4_text")
LENGTH, LAYERS, ROW = 100, 7, 32
EXACT: dict[str, Any] = {
    "graph_weights": "fp32",
    "table_codec": "f32",
    "accept_quality_loss": True,
}
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
SHALLOW_3N = SHALLOW | {
    "intermediate_size": 120,
    "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
}
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3n_text": {
        "as it is": {},
        "nothing shared": {"num_kv_shared_layers": 0},
        "odd heads": {"head_dim": 12},
        "no window": {"sliding_window": 128},
        "three streams, the last active": {"altup_num_inputs": 3, "altup_active_idx": 2},
        "no scale": {"altup_correct_scale": False},
        "dense gates of one width": {
            "activation_sparsity_pattern": [0.0] * LAYERS,
            "intermediate_size": 120,
        },
    },
    "gemma4_text": {
        "as it is": {},
        "nothing shared": {"num_kv_shared_layers": 0},
        "no rows, keys as values": NO_ROWS,
        "no cap": {"final_logit_softcapping": None},
        "odd heads": {"head_dim": 12, "global_head_dim": 24},
        "no window": {"sliding_window": 128},
    },
}
ALL = [(kind, switch) for kind in KINDS for switch in SWITCHES[kind]]
LIVELY = [
    ("gemma3n_text", "as it is"),
    ("gemma3n_text", "three streams, the last active"),
    ("gemma3n_text", "odd heads"),
    ("gemma4_text", "as it is"),
    ("gemma4_text", "no rows, keys as values"),
    ("gemma4_text", "odd heads"),
]
CACHES = {  # layer, heads, their width, window
    "gemma3n_text": [(0, 2, 16, 24), (1, 2, 16, None), (2, 2, 16, 24), (3, 2, 16, None)],
    "gemma4_text": [(0, 1, 16, 24), (1, 1, 32, None), (2, 1, 16, 24), (3, 1, 32, None)],
}
READERS = ("pread", "direct", "uring", "mmap")
each_family = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(("kind", "switch"), ALL)
def test_every_switch_climbs_the_ladder(kind: str, switch: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind, **SWITCHES[kind][switch])
    report = export_model(checkpoint, tmp_path / "out", **EXACT)
    assert [rung for rung in report.rungs if not rung.ok] == []


@pytest.mark.parametrize(("kind", "switch"), LIVELY)
def test_texts_beyond_the_window_are_as_in_transformers(
    kind: str, switch: str, tmp_path: Path
) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind, **SWITCHES[kind][switch])
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
        assert greedy(model, prompt) == greedy_of(network, prompt)


@each_family
def test_a_ragged_batch_is_as_each_text_alone(kind: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind)
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


@each_family
def test_prompts_whose_logits_nobody_wants_are_no_matter(kind: str, tmp_path: Path) -> None:
    """Layers that keep nothing are left out there, and what follows is the same."""
    checkpoint = write_dense(tmp_path / "dense", kind)
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


@each_family
def test_the_reference_behind_the_contract_computes_the_same(kind: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind)
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


@each_family
def test_the_table_holds_what_transformers_looks_up(kind: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind)
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
    assert shapes == CACHES[kind]


@each_family
def test_factors_of_embeddings_are_rounded_as_the_checkpoint_is(kind: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    network.save_pretrained(checkpoint)
    ids = np.arange(300)
    rows = Checkpoint.open(checkpoint).architecture.reference().rows()
    factor = float(torch.tensor(48**0.5).bfloat16())
    assert factor != pytest.approx(48**0.5, rel=1e-4)
    plain = network.model.embed_tokens.weight.float().detach().numpy()
    assert np.array_equal(rows.embeddings(ids), plain * np.float32(factor))


@each_family
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_few_bits_lose_little(
    kind: str, weights: str, kv_dtype: str | None, tmp_path: Path
) -> None:
    shallow = SHALLOW_3N if kind == "gemma3n_text" else SHALLOW
    checkpoint = write_dense(tmp_path / "dense", kind, **shallow)
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


@each_family
def test_streamed_is_resident_bit_for_bit(kind: str, tmp_path: Path) -> None:
    checkpoint = write_dense(tmp_path / "dense", kind)
    export_model(checkpoint, tmp_path / "out", graph_weights="int8", accept_quality_loss=True)
    resident = read_logits(tmp_path / "out", "ram")
    for reader in READERS:
        assert np.array_equal(read_logits(tmp_path / "out", reader), resident), reader


def read_logits(artifact: Path, reader: str) -> np.ndarray:
    ids = np.random.default_rng(4).integers(0, 256, 40).tolist()
    with (
        edge_memllm.load(artifact, reader=reader, threads=1) as model,
        Feeder(model.runtime, model.table, 1, 16) as feeder,
    ):
        return np.concatenate([np.array(feeder.score(0, ids[at : at + 16])) for at in (0, 16)])


@each_family
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_the_text_is_taken(kind: str, prefix: str, tmp_path: Path) -> None:
    text = write_dense(tmp_path / "text", kind)
    seeing = with_others(write_dense(tmp_path / "seeing", kind), prefix)
    report = export_model(seeing, tmp_path / "out", **EXACT)
    assert report.notes[0].startswith("vision_tower, embed_vision, audio_tower, embed_audio: left")
    assert report.manifest.model.architecture == kind
    assert report.manifest.model.identity == Checkpoint.open(text).identity()
    assert verify_against(tmp_path / "out", text)[3].ok


def with_others(checkpoint: Path, prefix: str) -> Path:
    """Make the folder that of a model which sees and hears, its text below `prefix`.

    It carries, too, what its layers would need that read other layers' keys and values.
    """
    where = checkpoint / "config.json"
    fields = json.loads(where.read_text())
    ids = {name: fields.pop(name) for name in ("eos_token_id", "bos_token_id")}
    whole = fields["model_type"].removesuffix("_text")
    where.write_text(json.dumps({"model_type": whole, "text_config": fields, **ids}))
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
