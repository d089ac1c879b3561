"""Keys and values in int8: calibrated steps, and a graph that holds the ladder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.modeling.configuration import CACHE
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export import verify_against
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.weights.kv_steps import kv_scales
from support.checkpoints import MakeArtifact, MakeCheckpoint

TEXT = "Keys are cached after the rotary embedding, values as they are. " * 7

SHAPES: list[dict[str, Any]] = [
    {},
    {"beta": 3, "num_key_value_heads": 2},
    {"num_attention_heads": 4, "hidden_size": 96},  # heads of 24, padded to 32 in the graph
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_cover_the_cached_keys_and_values(
    make_checkpoint: MakeCheckpoint, shape: dict[str, Any]
) -> None:
    source = Checkpoint.open(make_checkpoint(**shape))
    scales = kv_scales(source, TEXT)
    ids = torch.tensor([Tokenizer((source.path / "tokenizer.json").read_bytes()).encode(TEXT)])
    with torch.inference_mode():
        cache = source.architecture.reference().network(ids, use_cache=True)[CACHE]
    for layer, steps in zip(cache.layers, scales, strict=True):
        for cached, step in ((layer.keys, steps.key), (layer.values, steps.value)):
            largest = cached[0].abs().amax(1).numpy()  # [Hk, d]
            assert step.shape == largest.shape
            assert (largest <= 127 * step).all()
            assert (largest * 4 >= 127 * step).mean() > 0.9  # and do not waste the range


def test_the_largest_length_of_a_rotated_pair_counts(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint())
    for steps in kv_scales(source, TEXT):
        first, second = np.split(steps.key, 2, axis=-1)
        np.testing.assert_array_equal(first, second)


def test_without_a_tokenizer_random_tokens_do(
    checkpoint: Path, make_checkpoint: MakeCheckpoint
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    scales = kv_scales(Checkpoint.open(checkpoint), None)
    assert all((steps.key > 0).all() and (steps.value > 0).all() for steps in scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_the_ladder_holds(
    make_artifact: MakeArtifact,
    make_checkpoint: MakeCheckpoint,
    weights: str,
    shape: dict[str, Any],
) -> None:
    codec = "int4" if shape.get("hidden_size") == 96 else "int8"  # 96 is no multiple of 64
    artifact = make_artifact(graph_weights=weights, table_codec=codec, kv_dtype="int8", **shape)
    rungs = verify_against(artifact, make_checkpoint(**shape))
    assert [rung for rung in rungs if not rung.ok] == []


def test_half_the_bytes(make_artifact: MakeArtifact) -> None:
    lines = {}
    for kv_dtype in ("float16", "int8"):
        path = make_artifact(graph_weights="int8", kv_dtype=kv_dtype)
        with Artifact.open(path) as artifact:
            assert artifact.manifest.graph.kv_dtype == kv_dtype
        with edge_memllm.load(path, threads=1) as model:
            *_, last = model.stream(TEXT, max_new_tokens=2, ignore_eos=True)
            assert last.statistics is not None
            lines[kv_dtype] = last.statistics.kv_bytes
    assert lines["float16"] == 2 * lines["int8"]
