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

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_memllm.errors import RecipeError
from edge_memllm.modeling import training
from edge_memllm.modeling.data import TokenWindows
from edge_memllm.modeling.recipe import Recipe
from edge_memllm.modeling.trainer import LanguageModelTrainer, next_token_loss
from edge_memllm.modeling.training import train
from support import ROOT
from support.training import SENTENCES, TINY, recipe_for

PLAIN_TOKENIZER = Tokenizer(models.BPE()).to_str()


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(SENTENCES), encoding="utf-8")
    return str(path)


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

    @pytest.mark.parametrize(
        "fields",
        [
            {"memory_norm": "shared"},
            {"memory_source": "table"},
            {"memory_source": "both"},
            {"memory_sharing": "all_layers"},
        ],
        ids=str,
    )
    def test_every_memory_learns(self, text: str, tmp_path: Path, fields: dict[str, str]) -> None:
        recipe = recipe_for(text, steps=30, learning_rate=5e-3)
        recipe.update("model", fields, where="test")
        record = train(recipe, tmp_path / "out")
        losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
        assert losses[-1] < 0.7 * losses[0]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for name, weight in model.model.token_memory.named_parameters():
            assert weight.std() > 0, name

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
            "from support.training import recipe_for\n"
            "from edge_memllm.modeling import trainer, training\n"
            "slow = trainer.TrainingProgress.on_step_end\n"
            "def wait(*a, **k): time.sleep(1.0); return slow(*a, **k)\n"
            "trainer.TrainingProgress.on_step_end = wait\n"
            "recipe = recipe_for(sys.argv[1], precision='fp32', steps=8)\n"
            "training.train(recipe, Path(sys.argv[2]))\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script, text, str(tmp_path / "cut")],
            cwd=ROOT,
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

    def test_weights_that_cannot_be_written(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(training.MemoryLLMForCausalLM, "save_pretrained", full)
        with pytest.raises(RecipeError, match=r"out: weights cannot be written \(I/O error: No sp"):
            train(recipe_for(text, steps=0), tmp_path / "out")

    def test_a_family_shares_its_tokens(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second run makes neither tokenizer nor tokens, and ends as one without a cache."""
        recipe = recipe_for(text, precision="fp32", steps=2)
        train(recipe, tmp_path / "plain")
        recipe.data.cache = str(tmp_path / "cache")
        train(recipe, tmp_path / "first")
        assert len(list((tmp_path / "cache").iterdir())) == 2  # train and valid are one file here
        for name in ("train_tokenizer", "write_tokens"):
            monkeypatch.delattr(training, name)
        train(recipe, tmp_path / "second")
        plain, *others = (
            (tmp_path / name / "model.safetensors").read_bytes()
            for name in ("plain", "first", "second")
        )
        assert others == [plain, plain]

    def test_other_text_is_not_taken_from_the_cache(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text, steps=1)
        recipe.data.cache = str(tmp_path / "cache")
        train(recipe, tmp_path / "first")
        with open(text, "a", encoding="utf-8") as file:
            file.write("= more =\nOne more document.\n")
        train(recipe, tmp_path / "second")
        assert len(list((tmp_path / "cache").iterdir())) == 4

    def test_unwritable_cache(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.data.cache = str(tmp_path / "text.txt")  # a file where the folder should be
        with pytest.raises(RecipeError, match="cannot be written"):
            train(recipe, tmp_path / "out")

    def test_every_network_sees_the_same_sequences(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At one seed all variants, whatever random numbers their weights took, go one way."""
        seen: list[int] = []
        read = TokenWindows.__getitem__
        monkeypatch.setattr(
            TokenWindows, "__getitem__", lambda self, n: seen.append(n) or read(self, n)
        )
        orders = {}
        for seed, fields in [
            (5, {"beta": 0}),
            (5, {"beta": 3, "memory_source": "both"}),
            (5, {"beta": 8, "num_hidden_layers": 1, "intermediate_size": 48}),
            (6, {"beta": 0}),
        ]:
            recipe = recipe_for(text, steps=3, seed=seed)
            recipe.update("model", fields, where="test")
            recipe.data.valid = []
            seen.clear()
            train(recipe, tmp_path / f"out{len(orders)}")
            orders[len(orders)] = seen[:12]  # the loader reads one batch ahead
        assert len(set(orders[0])) == 12
        assert orders[0] == orders[1] == orders[2] != orders[3]

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

    @pytest.mark.parametrize("words", [40, 200])
    def test_a_validation_text_is_measured_whole(
        self, words: int, text: str, tmp_path: Path
    ) -> None:
        """One smaller than a batch, and one that is no multiple of it."""
        valid = tmp_path / "valid.txt"
        valid.write_text(" ".join(f"The cat {i} sat." for i in range(words)))
        recipe = recipe_for(text, steps=2, batch_size=16, precision="fp32")
        recipe.data.valid = [str(valid)]
        record = train(recipe, tmp_path / "out")
        windows = TokenWindows(tmp_path / "out/checkpoints/valid.npy", 32)
        assert len(windows) % 16
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        ids = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
        with torch.no_grad():
            expected = next_token_loss(model(ids).logits, ids, 0.0)
        assert record["valid_loss"] == pytest.approx(float(expected), rel=1e-4)

    def test_a_failing_evaluation_loses_no_training(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = train(recipe_for(text, steps=3, save_every=100), tmp_path / "whole")

        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModelTrainer, "evaluate", fail)
            with pytest.raises(MemoryError):
                train(recipe_for(text, steps=3, save_every=100), tmp_path / "out")
        record = train(recipe_for(text, steps=3, save_every=100), tmp_path / "out", resume=True)
        assert record["valid_loss"] == pytest.approx(whole["valid_loss"], rel=1e-4)

    def test_a_resume_of_another_network_is_refused(self, text: str, tmp_path: Path) -> None:
        train(recipe_for(text), tmp_path / "out")
        (tmp_path / "out/model.safetensors").unlink()
        recipe = recipe_for(text)
        recipe.model["num_hidden_layers"] = 1
        with pytest.raises(RecipeError, match=r"num_hidden_layers 2, now it is 1\. Resume with"):
            train(recipe, tmp_path / "out", resume=True)

    def test_data_shorter_than_a_batch(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text, batch_size=4096)
        with pytest.raises(RecipeError, match=r"training text holds \d+ sequences .* of 4096\."):
            train(recipe, tmp_path / "out")

    def test_a_text_after_one_that_was_refused_is_read(self, text: str, tmp_path: Path) -> None:
        small = tmp_path / "small.txt"
        small.write_text("zzz zzz")
        with pytest.raises(RecipeError, match="The training text holds"):
            train(recipe_for(str(small), steps=1), tmp_path / "out")
        train(recipe_for(text, steps=1), tmp_path / "out")
        train(recipe_for(text, steps=1), tmp_path / "new")
        for name in ("tokenizer.json", "model.safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()

    def test_data_shorter_than_a_sequence(self, text: str, tmp_path: Path) -> None:
        recipe = recipe_for(text)
        recipe.data.valid = []
        Path(text).write_text("Too short.")
        with pytest.raises(
            RecipeError, match=r"training text holds \d+ tokens, fewer than one sequence of"
        ):
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
        [("{}", "not a tokenizer that"), (PLAIN_TOKENIZER, "has no <|endoftext|> token")],
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
