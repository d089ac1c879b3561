from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from optimum.commands import optimum_cli
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig, AutoModelForCausalLM

from edge_memllm.huggingface import (
    EdgeMemLLMConfig,
    EdgeMemLLMExporterConfig,
    EdgeMemLLMForCausalLM,
)
from edge_memllm_export import export_model
from support import ROOT
from support.checkpoints import MakeCheckpoint, files_of

PLUGINS = ROOT / "export"
OPTIONS = ("--table-codec", "f32", "--graph-weights", "fp32", "--no-verify")


def optimum_cli_run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `optimum-cli` in a process of its own, as if the plugin's folder were installed."""
    paths = os.pathsep.join([str(PLUGINS), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_optimum_cli_exports_as_our_own_command_does(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    done = optimum_cli_run(
        "export", "edge-memllm", make_checkpoint(), tmp_path / "theirs", *OPTIONS
    )
    assert done.returncode == 0, done.stderr
    assert "NOT VERIFIED" in done.stdout
    export_model(
        make_checkpoint(), tmp_path / "ours", graph_weights="fp32", table_codec="f32", verify=False
    )
    assert files_of(tmp_path / "theirs") == files_of(tmp_path / "ours")


def test_optimum_cli_tells_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = optimum_cli_run("export", "edge-memllm", tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_optimums_own_parts_are_not_hidden() -> None:
    done = optimum_cli_run("env", "--help")
    assert done.returncode == 0, done.stderr
    commands = dict(optimum_cli.load_optimum_namespace_cli_commands() or [])
    assert all(command.COMMAND.name == "edge-memllm" for command in commands)


def test_the_tasks_manager_knows_the_family(make_checkpoint: MakeCheckpoint) -> None:
    config = AutoConfig.from_pretrained(make_checkpoint())
    tasks = TasksManager.get_supported_tasks_for_model_type(
        config.model_type, "edge-memllm", library_name="transformers"
    )
    assert set(tasks) == {"text-generation", "text-generation-with-past"}
    network = AutoModelForCausalLM.from_pretrained(make_checkpoint()).eval()
    for task in tasks:
        make = TasksManager.get_exporter_config_constructor(
            "edge-memllm", network, task=task, library_name="transformers"
        )
        made = make(network.config)
        assert isinstance(made, EdgeMemLLMExporterConfig)
        assert made.use_past == task.endswith("with-past")
        inputs = made.generate_dummy_inputs()
        assert set(inputs) == set(made.inputs)
        with torch.no_grad():
            assert set(made.outputs) <= set(network(**inputs))


def test_the_automatic_classes_know_the_artifact() -> None:
    config = AutoConfig.for_model("edge_memllm_artifact", vocab_size=5)
    assert isinstance(config, EdgeMemLLMConfig)
    assert AutoModelForCausalLM._model_mapping[EdgeMemLLMConfig] is EdgeMemLLMForCausalLM


def test_the_installed_program_has_the_command() -> None:
    program = Path(sys.executable).with_name("optimum-cli")  # of this environment
    done = subprocess.run(
        [program, "export", "--help"], capture_output=True, text=True, timeout=120
    )
    assert "edge-memllm" in done.stdout
