"""What transformers computes of a checkpoint, and what an artifact of it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edge_memllm import Sampling
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judging.judged_artifact import JudgedArtifact


def network_of(checkpoint: Path) -> Any:
    """Transformers' own network, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def logits_of(checkpoint: Path, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of that network."""
    with torch.inference_mode():
        logits: np.ndarray = network_of(checkpoint)(torch.tensor([ids])).logits[0].numpy()
    return logits


def greedy_of(network: Any, prompt: list[int], count: int = 40) -> list[int]:
    """The likeliest tokens of a network of transformers, which computes all anew for each."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def greedy(model: Any, prompt: list[int], count: int = 40, **options: Any) -> list[int]:
    """The likeliest tokens of a loaded model."""
    asked = {"sampling": Sampling(temperature=0.0), "ignore_eos": True, **options}
    return [piece.token for piece in model.stream(prompt, max_new_tokens=count, **asked)]


def judged(artifact: Path, checkpoint: Path) -> JudgedArtifact:
    """An artifact beside the network of its checkpoint."""
    return JudgedArtifact(artifact, Checkpoint.open(checkpoint).architecture.reference())
