"""Rungs 7 to 9 of the parity ladder, through the whole program: artifact, reader, runtime, loop.

Rungs 1 to 6 are climbed in test_graph.py and test_ladder.py, rung 10 in test_modeling.py.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.readers import reader_names
from edge_memllm.table.table import Table
from support.checkpoints import MakeArtifact, MakeCheckpoint
from support.networks import greedy

GREEDY = edge_memllm.Sampling(temperature=0.0)
PROMPTS = [[72, 101, 108, 108, 111], [84, 104, 101, 32, 114, 105, 118, 101, 114], [65]]
FAMILY: list[dict[str, Any]] = [
    {"beta": 0},
    {"beta": 1},
    {"beta": 2, "tie_word_embeddings": True},
    {"beta": 3, "num_key_value_heads": 2},
    {"beta": 3, "memory_source": "both", "memory_norm": "shared"},
    {"beta": 0, "memory_sharing": "all_layers"},
    {"beta": 8, "num_key_value_heads": 2},
    {"beta": 8, "intermediate_size": 0},
]
FORMS = [("int4", "int8"), ("int4", "int4"), ("fp16", "f16"), ("int8", "int4-g64"), ("fp32", "f32")]


def all_logits(model: edge_memllm.Model, prompt: list[int]) -> list[np.ndarray]:
    """Logits of the prompt's last position and of four decoding steps behind it."""
    with Feeder(model.runtime, model.table, 1, 4) as feeder:
        found = [np.array(feeder.prefill(0, prompt))]
        for _ in range(4):
            found.append(np.array(feeder.decode([int(found[-1].argmax())])[0]))
    return found


def working_readers(path: Path) -> list[str]:
    """Every reader but those that this system or its temporary folder refuses."""
    found = []
    with Artifact.open(path) as artifact:
        for name in reader_names():
            with suppress(edge_memllm.RequestError):
                Table.open(artifact, name).close()
                found.append(name)
    assert {"auto", "pread", "mmap", "ram"} <= set(found)
    return found


@pytest.mark.parametrize(("graph_weights", "table_codec"), FORMS)
@pytest.mark.parametrize("shape", [FAMILY[0], FAMILY[3]], ids=str)
def test_streamed_equals_resident_bit_for_bit(
    shape: dict[str, Any], graph_weights: str, table_codec: str, make_artifact: MakeArtifact
) -> None:
    """Rung 7."""
    path = make_artifact(graph_weights=graph_weights, table_codec=table_codec, **shape)
    with edge_memllm.load(path, device="cpu", reader="ram") as resident:
        expected = [all_logits(resident, prompt) for prompt in PROMPTS]
    for reader in working_readers(path):
        with edge_memllm.load(path, device="cpu", reader=reader) as streamed:
            for prompt, logits in zip(PROMPTS, expected, strict=True):
                np.testing.assert_array_equal(all_logits(streamed, prompt), logits)


@pytest.mark.parametrize("shape", FAMILY, ids=str)
def test_greedy_tokens_are_those_of_hugging_face(
    shape: dict[str, Any], make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    """Rung 8."""
    network = AutoModelForCausalLM.from_pretrained(make_checkpoint(**shape)).eval()
    path = make_artifact(graph_weights="fp32", table_codec="f32", **shape)
    with edge_memllm.load(path, device="cpu") as model:
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            expected = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=None,
            )
            assert greedy(model, prompt, 16) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", FAMILY, ids=str)
def test_a_batch_says_what_each_prompt_says_alone(
    shape: dict[str, Any], make_artifact: MakeArtifact
) -> None:
    """Rung 9."""
    path = make_artifact(graph_weights="fp32", table_codec="int8", **shape)
    options: dict[str, Any] = {"max_new_tokens": 16, "sampling": GREEDY, "ignore_eos": True}
    with edge_memllm.load(path, device="cpu") as model:
        together = model.generate(PROMPTS, **options)
        assert together == [model.generate(prompt, **options) for prompt in PROMPTS]
