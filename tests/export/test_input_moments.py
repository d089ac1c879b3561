"""What matrices are fed, against a network that is run as a whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_memllm.errors import ExportError
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.weights.damage import measure_sensitivities
from edge_memllm_export.weights.gptq import InputMoments, calibration_windows
from support.checkpoints import MakeCheckpoint

SHAPES: list[dict[str, Any]] = [
    {"beta": 0, "memory_gain": [0.5, -1.5]},
    {"beta": 1},
    {"beta": 2, "tie_word_embeddings": True},
    {"beta": 3, "num_key_value_heads": 2},
    {"beta": 1, "memory_source": "both", "memory_norm": "shared"},
    {"beta": 2, "memory_sharing": "all_layers", "memory_source": "both"},
    {"beta": 8},
]
TOKENS = [(7 * i * i + 3 * i) % 300 for i in range(10 * 256 + 9)]


def names(source: Checkpoint) -> list[str]:
    """The graph's matrices in its order."""
    found = []
    for layer in range(source.spec.num_hidden_layers):
        for kind in source.architecture.kinds[:-1]:
            part = "self_attn" if kind in ("qkv_proj", "o_proj") else "mlp"
            found.append(f"model.layers.{layer}.{part}.{kind}.weight")
    return [*found, "lm_head.weight"]


def read_by(name: str) -> str:
    module = name.removesuffix(".weight")
    return module.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_those_of_the_whole_network(
    shape: dict[str, Any], make_checkpoint: MakeCheckpoint
) -> None:
    source = Checkpoint.open(make_checkpoint(**shape))
    done: list[int] = []
    moments = InputMoments(source.architecture.reference(), TOKENS, 256, done.append)
    found = {name: moments.of(name) for name in names(source)}
    network, heard = source.architecture.reference().network, {}
    for name in found:
        network.get_submodule(read_by(name)).register_forward_pre_hook(
            lambda _, args, name=name: heard.update({name: args[0].flatten(0, 1).double()})
        )
    with torch.inference_mode():
        network(torch.tensor(TOKENS[:2560]).view(10, 256), use_cache=False)
    for name, x in heard.items():
        expected = (x.T @ x / len(x)).numpy()
        np.testing.assert_allclose(found[name], expected, atol=1e-4 * np.abs(expected).max())
    assert heard.keys() == found.keys()
    assert done == [1, 2]


def test_widened_heads_have_idle_inputs(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint(beta=0, head_dim=12))
    moments = InputMoments(source.architecture.reference(), TOKENS[:512], 256, lambda layers: None)
    moments.of("model.layers.0.self_attn.qkv_proj.weight")
    moment = moments.of("model.layers.0.self_attn.o_proj.weight")
    assert moment.shape == (64, 64)
    idle = np.tile([False] * 6 + [True] * 2, 8)
    np.testing.assert_array_equal(moment.diagonal() == 0, idle)
    np.testing.assert_array_equal(moment, moment.T)


def test_few_tokens_make_one_short_window(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint(beta=0))
    moment = InputMoments(source.architecture.reference(), [1, 2, 3], 256, lambda layers: None).of(
        "model.layers.0.self_attn.qkv_proj.weight"
    )
    assert 1 <= np.linalg.matrix_rank(moment, tol=1e-5) <= 3


def test_a_network_that_overflows_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(make_checkpoint(beta=0), tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.memory.down_proj.weight"][0] = 3e38  # finite; what it makes is not
    save_file(weights, broken / "model.safetensors")
    reference = Checkpoint.open(broken).architecture.reference()
    moments = InputMoments(reference, TOKENS[:256], 256, lambda layers: None)
    moments.of("model.layers.0.self_attn.o_proj.weight")
    with pytest.raises(ExportError, match=r"layers\.1.*qkv_proj.*calibration text is not\s+finite"):
        moments.of("model.layers.1.self_attn.qkv_proj.weight")


def modules_of(network: Any, name: str) -> list[torch.nn.Module]:
    """The modules whose rows a matrix of the graph is made of."""
    path = name.removesuffix(".weight")
    for kind, parts in {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}.items():
        if path.endswith(kind):
            stem = path.removesuffix(kind)
            return [network.get_submodule(f"{stem}{part}_proj") for part in parts]
    return [network.get_submodule(path)]


def test_tokens_count_by_their_weights(make_checkpoint: MakeCheckpoint) -> None:
    source = Checkpoint.open(make_checkpoint(beta=2))
    network = source.architecture.reference().network
    windows = calibration_windows(TOKENS, 256)
    matrices = {name: modules_of(network, name) for name in names(source)}
    found = measure_sensitivities(
        network, matrices, lambda ids: network(ids, use_cache=False).logits, windows.split(2)
    )
    assert all(each.tokens.shape == (windows.numel(),) for each in found.values())
    weights = {name: each.tokens for name, each in found.items()}
    reference = source.architecture.reference()
    moments = InputMoments(reference, TOKENS, 256, lambda done: None, weights)
    heard: dict[str, torch.Tensor] = {}
    for name, modules in matrices.items():
        modules[0].register_forward_pre_hook(
            lambda _, args, name=name: heard.update({name: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        network(windows, use_cache=False)
    for name, x in heard.items():
        expected = ((x.T * torch.from_numpy(weights[name])) @ x / len(x)).numpy()
        np.testing.assert_allclose(
            moments.of(name), expected, atol=1e-4 * np.abs(expected).max(), rtol=1e-3
        )
