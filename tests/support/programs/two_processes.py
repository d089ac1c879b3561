"""Run by ``accelerate launch`` in each of two processes: train, resume half way, shard.

Arguments: a text and a folder, where each process leaves digests of its weights.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from edge_memllm.modeling import MemoryLLMForCausalLM, training
from edge_memllm.modeling.recipe import Recipe
from edge_memllm.modeling.training import whole_network
from support.training import recipe_for

STEPS = 20


def recipe(text: str, batch_size: int) -> Recipe:
    """Every kind of parameter there is, at a size that trains in a second."""
    made = recipe_for(
        text,
        precision="fp32",
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=5e-3,
        save_every=STEPS // 2,
    )
    # Rows wide enough to be learned from in so few steps.
    model = {"beta": 3, "memory_source": "both", "memory_intermediate_size": 426}
    made.update("model", model, where="test")
    made.data.valid = []
    return made


class Recorder(training.TrainingProgress):
    """Notes what the weights of this process are at the end of training."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        digest = hashlib.sha256()
        for weight in kwargs["model"].parameters():
            digest.update(weight.detach().numpy().tobytes())
        with Path(sys.argv[2], f"weights-{PartialState().process_index}").open("a") as file:
            file.write(digest.hexdigest() + "\n")


def main(text: str, folder: Path) -> None:
    training.TrainingProgress = Recorder
    training.train(recipe(text, 2), folder / "whole")
    if PartialState().is_main_process:
        (folder / "cut/checkpoints").mkdir(parents=True)
        for name in ("tokenizer.json", f"checkpoints/checkpoint-{STEPS // 2}"):
            source = folder / "whole" / name
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, folder / "cut" / name)
    PartialState().wait_for_everyone()
    if training.resumes_on_cpus():
        training.train(recipe(text, 2), folder / "cut", resume=True)
    check_sharded(folder / "whole")
    (folder / f"sharded-{PartialState().process_index}").touch()


def check_sharded(checkpoint: Path) -> None:
    """Under FSDP the trained network has the gradients it has without, and comes back whole."""
    plain = MemoryLLMForCausalLM.from_pretrained(checkpoint)
    sharded = MemoryLLMForCausalLM.from_pretrained(checkpoint)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*sharded.model.layers, sharded):
        fully_shard(part, mesh=mesh)
    ids = torch.arange(64).view(2, 32) % 23
    for network in (plain, sharded):
        network(ids, labels=ids).loss.backward()
    whole = whole_network(sharded)
    for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(other, DTensor), name
        torch.testing.assert_close(one.grad, other.grad.full_tensor(), msg=name)
        if PartialState().is_main_process:
            assert torch.equal(one, whole.get_parameter(name)), name


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
