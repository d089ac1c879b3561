"""Training on a handful of sentences: recipe, tokenizer, packing, resume, and what is saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.corpus import TokenWindows, documents, write_tokens
from edge_memllm.modeling.recipe import DataRecipe, Recipe
from edge_memllm.modeling.tokenizer_training import END_OF_TEXT, byte_tokenizer, train_tokenizer
from edge_memllm.modeling.training import train

SENTENCES = [
    f"= title {i} =\nThe cat number {i} sat on the mat and saw {i * 7}.\n" for i in range(200)
]
PLAIN_TOKENIZER = Tokenizer(models.BPE()).to_str()
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(SENTENCES), encoding="utf-8")
    return str(path)


def recipe_for(text: str, **training: Any) -> Recipe:
    recipe = Recipe()
    recipe.update("model", {"preset": "tiny", **TINY}, where="test")
    recipe.update("tokenizer", {"vocab_size": 400}, where="test")
    data = {"train": [text], "valid": [text], "sequence_length": 32, "document_start": "^= .+ =$"}
    recipe.update("data", data, where="test")
    defaults = {"steps": 6, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "save_every": 2}
    recipe.update("training", {**defaults, **training}, where="test")
    return recipe


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")  # Trainer's own deprecation warnings are not ours
class TestTrain:
    def test_learns_and_saves_a_loadable_checkpoint(self, text: str, tmp_path: Path) -> None:
        record = train(recipe_for(text, steps=30, learning_rate=5e-3), tmp_path / "out")
        losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
        assert losses[-1] < 0.7 * losses[0]
        assert record["tokens_seen"] == 30 * 4 * 32
        assert record["valid_loss"] == record["history"][-1]["valid_loss"] < losses[0]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert model.config.vocab_size == len(tokenizer) == 400
        assert model.config.use_cache
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
        saved = json.loads((tmp_path / "out/training.json").read_text())
        assert saved["recipe"]["training"]["steps"] == 30
        assert [p.name for p in (tmp_path / "out").glob("*.bin")] == []

    def test_same_seed_same_weights(self, text: str, tmp_path: Path) -> None:
        files = []
        for name in ("a", "b"):
            train(recipe_for(text, precision="fp32"), tmp_path / name)
            files.append((tmp_path / name / "model.safetensors").read_bytes())
        assert files[0] == files[1]

    def test_resume_ends_where_one_run_ends(self, text: str, tmp_path: Path) -> None:
        """Killed after a checkpoint, then resumed: the weights of a run never stopped."""
        train(recipe_for(text, precision="fp32", steps=8), tmp_path / "whole")
        self.kill_after_checkpoint(text, tmp_path)
        with pytest.raises(RecipeError, match=r"unfinished run\. Continue it with --resume"):
            train(recipe_for(text, precision="fp32", steps=8), tmp_path / "cut")
        record = train(recipe_for(text, precision="fp32", steps=8), tmp_path / "cut", resume=True)
        assert [e["step"] for e in record["history"] if "loss" in e] == list(range(1, 9))
        whole, cut = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "cut")
        )
        for (name, one), (_, two) in zip(
            whole.named_parameters(), cut.named_parameters(), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)

    def kill_after_checkpoint(self, text: str, tmp_path: Path) -> None:
        """Start the same run in a process, slowed down, and kill -9 it past its first save."""
        script = (
            "import sys, time, torch; torch.set_num_threads(1)\n"
            "from pathlib import Path\n"
            "from tests.test_training import recipe_for\n"
            "from edge_memllm.modeling import progress, training\n"
            "slow = progress.TrainingProgress.on_step_end\n"
            "def wait(*a, **k): time.sleep(1.0); return slow(*a, **k)\n"
            "progress.TrainingProgress.on_step_end = wait\n"
            "recipe = recipe_for(sys.argv[1], precision='fp32', steps=8)\n"
            "training.train(recipe, Path(sys.argv[2]))\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script, text, str(tmp_path / "cut")],
            cwd=Path(__file__).parent.parent,
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

    def test_a_finished_model_is_not_overwritten(self, text: str, tmp_path: Path) -> None:
        train(recipe_for(text, steps=0), tmp_path / "out")
        with pytest.raises(RecipeError, match="holds a finished model already"):
            train(recipe_for(text, steps=0), tmp_path / "out")

    def test_zero_steps_without_data(self, tmp_path: Path) -> None:
        recipe = Recipe()
        recipe.update("model", {"preset": "tiny", **TINY, "vocab_size": 300}, where="test")
        recipe.update("training", {"steps": 0, "save_dtype": "bfloat16"}, where="test")
        train(recipe, tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.bfloat16
        assert model.config.vocab_size == len(tokenizer) == 300

    def test_data_shorter_than_a_sequence(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.data.valid = []
        Path(text).write_text("Too short.")
        with pytest.raises(RecipeError, match="fewer than one sequence of 32"):
            train(recipe, tmp_path / "out")

    def test_sequence_beyond_the_context(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.data.sequence_length = 4096
        with pytest.raises(RecipeError, match="beyond the network's max_position_embeddings"):
            train(recipe, tmp_path / "out")

    def test_wrong_model_field(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.model["beta"] = 11
        with pytest.raises(RecipeError, match=r"\[model\].*beta is 11"):
            train(recipe, tmp_path / "out")

    def test_unknown_model_field(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.model["hiden_size"] = 64
        with pytest.raises(RecipeError, match=r"\[model\] unknown key 'hiden_size'"):
            train(recipe, tmp_path / "out")

    def test_vocabulary_smaller_than_the_tokenizer(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.model["vocab_size"] = 300
        with pytest.raises(RecipeError, match="vocab_size is 300, but the tokenizer has 400"):
            train(recipe, tmp_path / "out")

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{}", "not a readable tokenizer.json"), (PLAIN_TOKENIZER, "has no <|endoftext|> token")],
    )
    def test_unusable_tokenizer(
        self, text: str, tmp_path: Path, content: str, message: str
    ) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        recipe = recipe_for(text)
        recipe.tokenizer.path = str(tmp_path / "tokenizer.json")
        with pytest.raises(RecipeError, match=message.replace("|", r"\|")):
            train(recipe, tmp_path / "out")

    def test_wrong_trainer_field(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.trainer["no_such_thing"] = 1
        with pytest.raises(RecipeError, match=r"\[trainer\].*no_such_thing"):
            train(recipe, tmp_path / "out")


class TestRecipe:
    def test_toml_and_overrides(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.toml"
        path.write_text('[training]\nsteps = 7\nlearning_rate = 1\n[model]\npreset = "1b"\n')
        recipe = Recipe.load(path)
        assert (recipe.training.steps, recipe.training.learning_rate) == (7, 1.0)
        recipe.override("training.save_dtype=float16")
        recipe.override('trainer.fsdp="full_shard"')
        assert recipe.training.save_dtype == "float16"
        assert recipe.trainer == {"fsdp": "full_shard"}

    def test_the_shipped_recipe_is_valid(self) -> None:
        path = Path(__file__).parent.parent / "examples/recipes/tiny-english.toml"
        recipe = Recipe.load(path)
        recipe.data.train = ["text.txt"]
        recipe.validate()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[training]\nstep = 1", r"unknown key 'step'; known are steps"),
            ("[traning]\nsteps = 1", r"unknown section \[traning\]"),
            ("[training]\nsteps = true", "steps is True; expected int"),
            ('[data]\ntrain = "a.txt"', r"train is 'a.txt'; expected list\[str\]"),
            ("[training", "not a TOML file"),
        ],
    )
    def test_wrong_files(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "recipe.toml"
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            Recipe.load(path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(tmp_path / "none.toml")

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("training.batch_size=0", "batch_size is 0; use 1 or more"),
            ("training.steps=-1", "steps is -1"),
            ("training.precision=fp8", "precision is 'fp8'"),
            ("training.save_dtype=int8", "save_dtype is 'int8'"),
            ("training.min_learning_rate=1.0", "above learning_rate"),
            ("data.sequence_length=1", "sequence_length is 1"),
            ("training.steps=1", "train is empty"),
        ],
    )
    def test_impossible_values(self, assignment: str, message: str) -> None:
        recipe = Recipe()
        recipe.override(assignment)
        with pytest.raises(RecipeError, match=message):
            recipe.validate()

    @pytest.mark.parametrize("assignment", ["training", "training.steps", "steps=3"])
    def test_malformed_override(self, assignment: str) -> None:
        with pytest.raises(RecipeError, match=r"expected section\.key=value"):
            Recipe().override(assignment)


class TestCorpus:
    def test_documents_of_plain_text(self, text: str) -> None:
        whole = list(documents([text], DataRecipe()))
        split = list(documents([text], DataRecipe(document_start="^= .+ =$")))
        assert whole == ["".join(SENTENCES)]
        assert split == SENTENCES

    def test_documents_of_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
        assert list(documents([str(path)], DataRecipe())) == ["one", "two"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: expected a JSON object"),
            ('{"body": "x"}', "line 1: expected a JSON object with a 'text' field"),
            ('{"text": 3}', "line 1: 'text' is not a string"),
        ],
    )
    def test_bad_json_lines(self, tmp_path: Path, line: str, message: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(RecipeError, match=message):
            list(documents([str(path)], DataRecipe()))

    def test_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"none\.txt: cannot be read"):
            list(documents([str(tmp_path / "none.txt")], DataRecipe()))
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(RecipeError, match="not UTF-8"):
            list(documents([str(tmp_path / "latin.txt")], DataRecipe()))

    def test_windows_tile_the_packed_documents(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer(300)
        path = tmp_path / "tokens.npy"
        count = write_tokens(["abc", "defgh"], tokenizer, 0, path)
        tokens = np.load(path)
        assert count == len(tokens) == 10
        assert tokens[0] == tokens[4] == 0
        windows = TokenWindows(path, 4)
        assert len(windows) == 2
        joined = torch.cat([windows[i]["input_ids"] for i in range(2)])
        assert joined.tolist() == tokens[:8].tolist()


class TestTokenizer:
    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=60))
    def test_any_text_round_trips(self, text: str) -> None:
        for tokenizer in (TRAINED, byte_tokenizer(300)):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text

    def test_end_of_text_is_token_zero(self) -> None:
        assert TRAINED.token_to_id(END_OF_TEXT) == 0
        assert TRAINED.get_vocab_size() == 400

    def test_too_small_vocabulary(self) -> None:
        with pytest.raises(RecipeError, match="vocab_size is 256; a byte-level"):
            train_tokenizer(SENTENCES, 256)
        with pytest.raises(RecipeError, match="vocab_size is 256; a byte vocabulary"):
            byte_tokenizer(256)


TRAINED: Tokenizer = train_tokenizer(SENTENCES, 400)
