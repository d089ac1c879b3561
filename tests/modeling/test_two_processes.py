"""Training in two processes on the CPU (gloo), started by ``accelerate launch`` as users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.training import check_resuming, resumes_on_cpus, train
from support.programs import two_processes
from support.programs.two_processes import STEPS, recipe
from support.training import SENTENCES

LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "text.txt").write_text("".join(SENTENCES), encoding="utf-8")
    script = Path(two_processes.__file__)
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(script), str(folder / "text.txt"), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "training.json").read_text())["history"]
    return [entry["loss"] for entry in history]


def test_both_processes_end_with_the_same_weights(trained: Path) -> None:
    one, two = ((trained / f"weights-{rank}").read_text().split() for rank in (0, 1))
    assert one == two
    assert len(one) == 1 + resumes_on_cpus()  # the whole run and the resumed one


def test_the_loss_falls(trained: Path) -> None:
    found = losses(trained / "whole")
    assert len(found) == STEPS
    assert found[-1] < 0.7 * found[0]


@pytest.mark.skipif(not resumes_on_cpus(), reason="this transformers cannot")
def test_a_resumed_run_ends_where_the_whole_one_does(trained: Path) -> None:
    assert losses(trained / "cut") == pytest.approx(losses(trained / "whole"), rel=1e-5)
    whole, cut = (network(trained / name) for name in ("whole", "cut"))
    for name, weight in whole.items():
        torch.testing.assert_close(weight, cut[name], rtol=1e-5, atol=1e-6, msg=name)


def test_fsdp_has_the_same_gradients_and_comes_back_whole(trained: Path) -> None:
    assert [(trained / f"sharded-{rank}").exists() for rank in (0, 1)] == [True, True]


def test_two_processes_train_like_one_with_twice_the_batch(trained: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    train(recipe(str(trained / "text.txt"), 4), tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(trained / "whole"), rel=1e-3)


def network(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_resuming_where_the_library_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    check_resuming(torch.device("cuda:1"), 2)
    check_resuming(torch.device("cpu"), 1)
    with pytest.raises(RecipeError, match=r"5\.17\.0 cannot resume in several processes on CPUs"):
        check_resuming(torch.device("cpu:0"), 2)
