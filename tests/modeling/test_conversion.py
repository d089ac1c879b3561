"""Conversion end to end: dense checkpoint, student, distillation, export, generation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import edge_memllm
from edge_memllm.cli.main import main
from edge_memllm.errors import RecipeError
from edge_memllm.modeling.conversion import convert, dense_network, student_config
from edge_memllm.modeling.distillation import divergence
from edge_memllm.modeling.fitting import initialize, planted
from edge_memllm.modeling.network import MemoryLLMForCausalLM
from edge_memllm.modeling.recipe import ConversionRecipe
from edge_memllm_export import export_model
from support.checkpoints import FAMILIES, change_config, write_dense

CONVERTED = [kind for kind in FAMILIES if not kind.startswith("gemma")]  # which stays dense


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The cat number {i} sat on mat {i * 7}.\n" for i in range(60)))
    return str(path)


def recipe_for(text: str, beta: int = 3, **sections: dict[str, Any]) -> ConversionRecipe:
    recipe = ConversionRecipe()
    recipe.update("model", {"beta": beta, **sections.pop("model", {})}, where="test")
    recipe.update("data", {"train": [text], "sequence_length": 32}, where="test")
    training = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "save_every": 2}
    training |= {"precision": "fp32", **sections.pop("training", {})}
    recipe.update("training", training, where="test")
    for section, values in sections.items():
        recipe.update(section, values, where="test")
    return recipe


def some_ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CONVERTED)
def test_beta_8_computes_what_the_dense_model_computes(
    kind: str, text: str, tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "dense", kind)
    convert(dense, tmp_path / "student", recipe_for(text, beta=8, training={"steps": 0}))
    theirs = AutoModelForCausalLM.from_pretrained(dense).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        expected, found = theirs(some_ids()).logits, ours(some_ids()).logits
    assert expected.std() > 0.5
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", CONVERTED)
def test_convert_distil_export_run(kind: str, text: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", kind)
    (dense / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (dense / "generation_config.json").write_text('{"eos_token_id": 257, "top_k": 5}')
    beta = 0 if kind in ("mistral", "edge_memllm") else 3
    record = convert(dense, tmp_path / "student", recipe_for(text, beta))
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4]
    report = export_model(
        tmp_path / "student",
        tmp_path / "artifact",
        graph_weights="fp32",
        table_codec="f32",
        quality_text="The cat sat on the mat. " * 10,
    )
    assert all(rung.ok for rung in report.rungs)
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "artifact" / name).read_bytes() == (dense / name).read_bytes()
    assert report.manifest.model.eos_token_ids == (257,)
    with edge_memllm.load(tmp_path / "artifact", device="cpu") as model:
        pieces = model.stream("The cat", max_new_tokens=8, ignore_eos=True)
        assert len([piece.token for piece in pieces]) == 8


def distance(student: MemoryLLMForCausalLM, dense: Path, text: str) -> float:
    """Mean KL divergence from the dense model on the start of the text."""
    tokenizer = Tokenizer.from_file(str(dense / "tokenizer.json"))
    ids = tokenizer.encode(Path(text).read_text()[:120]).ids
    with torch.no_grad():
        logits = student.eval()(torch.tensor([ids])).logits
        return float(divergence(logits, dense_network(dense)(torch.tensor([ids])).logits))


@pytest.mark.parametrize("source", ["ffn", "table", "both"])
def test_every_kind_of_memory_is_fitted(source: str, text: str, tmp_path: Path) -> None:
    """Closer to the dense network than without its feed-forward parts."""
    dense = write_dense(tmp_path / "dense", "llama")
    recipe = recipe_for(text, model={"memory_source": source}, training={"steps": 0})
    convert(dense, tmp_path / "student", recipe)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    fitted = distance(student, dense, text)
    for layer in student.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    student.config.memory_gain = [0.0] * 3
    assert fitted < 0.5 * distance(student, dense, text)


def led_by(boundary: int, windows: int, seed: int = 3) -> torch.Tensor:
    """Windows that begin with the boundary, and have another one inside."""
    ids = torch.randint(0, 200, (windows, 24), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = ids[:, 12] = boundary
    return ids


def test_what_is_first_in_every_window_is_kept_as_it_is(tmp_path: Path) -> None:
    """What layers give there is a constant, and the boundary's row holds it; else it is a mean."""
    teacher = dense_network(write_dense(tmp_path / "dense", "llama"))
    recipe = recipe_for("", beta=0, model={"memory_source": "table"})
    config = student_config(teacher.config, recipe)
    boundary = int(config.bos_token_id)
    ids = led_by(boundary, 12)
    student = MemoryLLMForCausalLM(config)
    initialize(student, teacher, ids, boundary)
    wanted, own = (
        net(input_ids=ids, use_cache=False).logits[:, 0].detach() for net in (teacher, student)
    )
    assert torch.allclose(own, wanted, atol=1e-3)
    apart = led_by(boundary, 12)
    apart[:, 0] = torch.arange(12)
    initialize(student, teacher, apart, boundary)
    own = student(input_ids=ids, use_cache=False).logits[:, 0].detach()
    assert not torch.allclose(own, wanted, atol=0.1)


def test_distillation_comes_closer(text: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "mistral")
    found = []
    for steps in (0, 30):
        training = {"steps": steps, "save_every": 30, "learning_rate": 1e-3}
        recipe = recipe_for(text, beta=1, training=training)
        convert(dense, tmp_path / f"{steps}", recipe)
        student = AutoModelForCausalLM.from_pretrained(tmp_path / f"{steps}")
        found.append(distance(student, dense, text))
    assert found[1] < 0.9 * found[0]


def test_layers_take_over_in_stages(text: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen3")
    stages = {"layers_per_stage": 1, "label_weight": 0.5, "kl_weight": 0}
    record = convert(dense, tmp_path / "out", recipe_for(text, conversion=stages))
    assert len(record["history"]) == 4


def test_resume_ends_where_one_run_ends(text: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "qwen2")
    convert(dense, tmp_path / "whole", recipe_for(text))
    kill_after_checkpoint(dense, text, tmp_path)
    with pytest.raises(RecipeError, match=r"unfinished run\. Continue it with --resume"):
        convert(dense, tmp_path / "cut", recipe_for(text))
    record = convert(dense, tmp_path / "cut", recipe_for(text), resume=True)
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4]
    whole, cut = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "cut")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def kill_after_checkpoint(dense: Path, text: str, tmp_path: Path) -> None:
    """Start the same conversion in a process, slowed down, and kill -9 it past its first save."""
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from test_conversion import convert, recipe_for\n"
        "from edge_memllm.modeling import trainer\n"
        "slow = trainer.TrainingProgress.on_step_end\n"
        "def wait(*a, **k): time.sleep(1.0); return slow(*a, **k)\n"
        "trainer.TrainingProgress.on_step_end = wait\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[3]), recipe_for(sys.argv[2]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(dense), text, str(tmp_path / "cut")],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    saved = tmp_path / "cut/checkpoints/checkpoint-2/trainer_state.json"
    deadline = time.monotonic() + 120
    while not saved.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert saved.exists()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 64}, "sliding window of 64 tokens within 128 positions"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding window of 16"),
    ("llama", {"model_type": "gemma2"}, "model_type is 'gemma2'; networks of llama, mistral"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
    ("llama", {"attention_bias": True}, "attention_bias is true for llama"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true for llama"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type is 'yarn'; default, linear, llama3",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "turns a part of each head only",
    ),
    ("edge_memllm", {"beta": 3}, "it has beta 3"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED)
def test_unsupported_networks_are_refused_by_name(
    kind: str, fields: dict[str, Any], message: str, text: str, tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "dense", kind)
    change_config(dense, **fields)
    with pytest.raises(RecipeError, match=message):
        convert(dense, tmp_path / "out", recipe_for(text))
    assert not (tmp_path / "out").exists()


def test_broken_folders_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere: no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out", recipe_for(text))
    dense = write_dense(tmp_path / "dense", "llama")
    (dense / "tokenizer.json").rename(dense / "kept.json")
    with pytest.raises(RecipeError, match=r"tokenizer\.json: no such file\. Save the tokenizer"):
        convert(dense, tmp_path / "out", recipe_for(text))
    (dense / "tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"not a tokenizer that"):
        convert(dense, tmp_path / "out", recipe_for(text))
    (dense / "kept.json").rename(dense / "tokenizer.json")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"found pytorch_model\.bin but no model\.safetensors"):
        convert(dense, tmp_path / "out", recipe_for(text))
    change_config(dense, bos_token_id=None, eos_token_id=None)
    with pytest.raises(RecipeError, match="neither bos_token_id nor eos_token_id"):
        convert(dense, tmp_path / "out", recipe_for(text))
    change_config(dense, vocab_size=200)
    with pytest.raises(
        RecipeError, match=r"config\.json: cannot be converted: .*Padding_idx must be"
    ):
        convert(dense, tmp_path / "out", recipe_for(text))
    change_config(dense, pad_token_id=None)
    with pytest.raises(RecipeError, match="has 259 tokens, the network 200"):
        convert(dense, tmp_path / "out", recipe_for(text))
    (dense / "config.json").write_text("[]")
    with pytest.raises(RecipeError, match="expected a JSON object at the top"):
        convert(dense, tmp_path / "out", recipe_for(text))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"hidden_size": 64}, r"\[model\] hidden_size: a student chooses beta, interm"),
        ("model", {"beta": 9}, r"\[model\] beta is 9"),
        ("model", {"beta": "3"}, r"\[model\] .*"),
        ("model", {"intermediate_size": 121}, "the dense network has 120 neurons"),
        ("model", {"beta": 8, "intermediate_size": 60}, r"\(beta 8\) keeps all 120 neurons"),
        ("data", {"train": []}, r"\[data\] train is empty; a student"),
        ("data", {"sequence_length": 129}, "beyond the network's max_position_embeddings"),
        ("tokenizer", {"vocab_size": 500}, r"\[tokenizer\] is for training"),
        ("conversion", {"fit_tokens": 31}, "fit_tokens is 31, less than one sequence of 32"),
        ("conversion", {"kl_weight": -1}, "kl_weight is -1.0; use 0 or more"),
        ("conversion", {"kl_weight": 0, "hidden_weight": 0}, "nothing to learn"),
    ],
)
def test_impossible_recipes_are_refused(
    section: str, values: dict[str, Any], message: str, text: str, tmp_path: Path
) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    recipe = recipe_for(text, training={"steps": 0})
    recipe.update(section, values, where="test")
    with pytest.raises(RecipeError, match=message):
        convert(dense, tmp_path / "out", recipe)


def test_without_a_beta_the_student_is_that_of_beta_3(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    words = ["--data", text, "--steps", "0", "--set", "data.sequence_length=32"]
    for out, beta in (("default", []), ("three", ["--beta", "3"])):
        assert main(["convert", str(dense), str(tmp_path / out), *words, *beta]) == 0
    assert json.loads((tmp_path / "default/config.json").read_text())["beta"] == 3
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "default" / name).read_bytes() == (
            tmp_path / "three" / name
        ).read_bytes()


def test_a_dense_student_that_is_not_trained_needs_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_dense(tmp_path / "dense", "llama", bos_token_id=None, eos_token_id=None)
    words = ["convert", str(dense), str(tmp_path / "out"), "--beta", "8"]
    assert main([*words, "--steps", "0"]) == 0
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "out", dense)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert main([*words, "--steps", "1"]) == 1
    assert "[data] train is empty" in capsys.readouterr().err


def test_command_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = write_dense(tmp_path / "dense", "qwen3"), tmp_path / "out"
    options = ["--steps", "2", "--beta", "1", "--layers-per-stage", "2", "--json"]
    small = ["--set", "data.sequence_length=32", "--set", "training.batch_size=2"]
    code = main(["convert", str(dense), str(out), "--data", text, *options, *small])
    shown = json.loads(capsys.readouterr().out)
    assert (code, shown["checkpoint"]) == (0, str(out))
    assert json.loads((out / "config.json").read_text())["beta"] == 1
    assert main(["convert", str(dense), str(out), "--data", text, *small]) == 1
    assert "Continue it with --resume" in capsys.readouterr().err


def test_record_of_a_conversion(text: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama")
    convert(dense, tmp_path / "out", recipe_for(text, training={"steps": 0}))
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["dense"]["parameters"] > 0
    assert record["recipe"]["conversion"]["kl_weight"] == 1.0
    with pytest.raises(RecipeError, match="holds a finished model already"):
        convert(dense, tmp_path / "out", recipe_for(text))


def test_every_token_is_planted_once_and_the_rest_is_the_text() -> None:
    ids = torch.randint(0, 300, (3, 22), generator=torch.Generator().manual_seed(1))
    windows, places = planted(ids, 300)
    assert windows[:, places].flatten()[:300].tolist() == list(range(300))
    rest = torch.ones(22, dtype=torch.bool)
    rest[places] = False
    assert rest[0]
    assert torch.equal(windows[:3, rest], ids[:, rest])
    assert torch.equal(windows[3, rest], ids[0, rest])
    shortest, places = planted(ids[:, :2], 300)
    assert (shortest.shape, places.tolist()) == ((300, 2), [1])


def test_a_token_that_the_text_lacks_has_what_it_does_in_a_text(tmp_path: Path) -> None:
    """Its row is nearer to what it puts out there than what it puts out behind the first token."""
    dense = write_dense(tmp_path / "dense", "llama")
    teacher = dense_network(dense)
    recipe = recipe_for("none", 0, model={"memory_source": "table"})
    student = MemoryLLMForCausalLM(student_config(teacher.config, recipe)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, 110, (64, 32), generator=generator)
    ids[:, 0] = teacher.config.bos_token_id
    initialize(student, teacher, ids, teacher.config.bos_token_id)
    lacking = torch.arange(110, 122)
    other = torch.randint(97, 110, (len(lacking), 32), generator=generator)
    other[:, 0], other[:, 20] = teacher.config.bos_token_id, lacking
    layer = teacher.model.layers[0]
    outputs: list[torch.Tensor] = []
    layer.mlp.register_forward_hook(lambda *args: outputs.append(args[2]))
    pairs = torch.stack([other[:, 0], lacking], dim=1)
    for text in (other, pairs):
        teacher(input_ids=text, use_cache=False)
    wanted, alone = outputs[0][:, 20], outputs[1][:, 1]
    rows = student.model.memory_rows(lacking)[:, 0]
    missed = [(found - wanted).square().sum().item() for found in (rows, alone)]
    assert missed[0] < missed[1]
