"""Recipe to checkpoint: tokenizer, token files, network, Hugging Face Trainer, saved weights.

One process, several GPUs and FSDP are the same call: ``accelerate launch`` starts more of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import GenerationConfig
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import MemoryLLMConfig
from edge_memllm.modeling.corpus import TokenWindows, documents, write_tokens
from edge_memllm.modeling.network import MemoryLLMForCausalLM
from edge_memllm.modeling.presets import preset_config
from edge_memllm.modeling.progress import TrainingProgress
from edge_memllm.modeling.recipe import Recipe
from edge_memllm.modeling.tokenizer_training import (
    END_OF_TEXT,
    byte_tokenizer,
    read_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from edge_memllm.modeling.trainer import (
    LanguageModelTrainer,
    keep_freed_memory,
    training_arguments,
)

RECORD_FILE = "training.json"
_CHECKPOINTS = "checkpoints"


def train(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train what the recipe says into the folder ``out``; what was reached, as plain data.

    With ``steps = 0`` the initialised network is written, untrained. ``resume`` continues from
    the newest checkpoint under ``out``; without it an ``out`` that has one is refused.
    """
    recipe.validate()
    config = model_config(recipe)
    _check_target(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    state = _state()
    with state.main_process_first():
        tokenizer = _tokenizer(recipe, config, out)
    _fit(config, tokenizer, recipe)
    torch.manual_seed(recipe.training.seed)
    model = MemoryLLMForCausalLM(config)
    record: dict[str, Any] = {"recipe": recipe.as_dict(), "parameters": _count(model)}
    if recipe.training.steps:
        with state.main_process_first():
            _prepare_tokens(recipe, tokenizer, out)
        record |= _run(recipe, model, out, resume)
    if state.is_main_process:
        _save(recipe, model, tokenizer, record, out)
    state.wait_for_everyone()
    return record


def is_main_process() -> bool:
    """Whether this process speaks for all that train together."""
    return bool(_state().is_main_process)


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def _check_target(out: Path, resume: bool) -> None:
    started = any((out / _CHECKPOINTS).glob("checkpoint-*"))
    if started and not resume:
        raise RecipeError(
            f"{out}: holds the checkpoints of an unfinished run. "
            "Continue it with --resume, or choose another folder."
        )
    if (out / "model.safetensors").exists():
        raise RecipeError(f"{out}: holds a finished model already. Choose another folder.")


def model_config(recipe: Recipe) -> MemoryLLMConfig:
    """The network's shape: the preset of ``[model]`` with its other keys in place of fields."""
    fields = {"preset": "tiny", **recipe.model}
    known = MemoryLLMConfig().to_dict()
    for key in fields:
        if key != "preset" and key not in known:
            raise RecipeError(f"[model] unknown key {key!r}; known are preset, {', '.join(known)}.")
    try:
        config = preset_config(fields.pop("preset"), **fields)
    except StrictDataclassError as error:
        raise RecipeError(f"[model] {error.__cause__ or error}") from error
    except ValueError as error:
        raise RecipeError(f"[model] {error}") from error
    if config.max_position_embeddings < recipe.data.sequence_length and recipe.training.steps:
        raise RecipeError(
            f"[data] sequence_length is {recipe.data.sequence_length}, beyond the network's "
            f"max_position_embeddings ({config.max_position_embeddings})."
        )
    return config


def _tokenizer(recipe: Recipe, config: MemoryLLMConfig, out: Path) -> Tokenizer:
    """The tokenizer in ``out``, made on the first call; later processes and resumes read it."""
    path = out / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    if recipe.tokenizer.path is not None:
        tokenizer = read_tokenizer(recipe.tokenizer.path)
    elif recipe.data.train:
        texts = documents(recipe.data.train, recipe.data)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    else:
        tokenizer = byte_tokenizer(config.vocab_size)
    save_tokenizer(tokenizer, out, config.max_position_embeddings)
    return tokenizer


def _fit(config: MemoryLLMConfig, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Give the network the tokenizer's boundary token, and its size unless one was asked for."""
    boundary = tokenizer.token_to_id(END_OF_TEXT)
    config.bos_token_id = config.eos_token_id = boundary
    size = tokenizer.get_vocab_size()
    if "vocab_size" not in recipe.model:
        config.vocab_size = size
    elif config.vocab_size < size:
        raise RecipeError(
            f"[model] vocab_size is {config.vocab_size}, but the tokenizer has {size} tokens. "
            "Leave vocab_size out of [model] to follow the tokenizer."
        )


def _prepare_tokens(recipe: Recipe, tokenizer: Tokenizer, out: Path) -> None:
    boundary = tokenizer.token_to_id(END_OF_TEXT)
    for split, paths in (("train", recipe.data.train), ("valid", recipe.data.valid)):
        target = out / _CHECKPOINTS / f"{split}.npy"
        if paths and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_tokens(documents(paths, recipe.data), tokenizer, boundary, target)


def _run(recipe: Recipe, model: MemoryLLMForCausalLM, out: Path, resume: bool) -> dict[str, Any]:
    training, folder = recipe.training, out / _CHECKPOINTS
    length = recipe.data.sequence_length
    windows = TokenWindows(folder / "train.npy", length)
    valid = TokenWindows(folder / "valid.npy", length) if recipe.data.valid else None
    arguments = training_arguments(recipe, folder)
    if arguments.device.type == "cpu":
        keep_freed_memory()
    tokens_per_step = (
        length * training.batch_size * training.gradient_accumulation_steps * arguments.world_size
    )
    progress = TrainingProgress(tokens_per_step)
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        eval_dataset=valid,
        callbacks=[progress],
        z_loss=training.z_loss,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    has_checkpoint = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume and has_checkpoint)
    history = _history(trainer.state.log_history, tokens_per_step)
    if valid is not None and not (history and "valid_loss" in history[-1]):
        trainer.evaluate()
        history = _history(trainer.state.log_history, tokens_per_step)
    result: dict[str, Any] = {
        "tokens_seen": trainer.state.global_step * tokens_per_step,
        "training_tokens": len(windows.tokens),
        "device": arguments.device.type,
        "precision": "bf16" if arguments.bf16 else "fp32",
        "history": history,
    }
    if valid is not None:
        result["valid_loss"] = history[-1]["valid_loss"]
    return result


def _history(log: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, Any]]:
    """The losses of the whole run; Trainer's log goes through checkpoints and resumes."""
    names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}
    names["eval_loss"] = "valid_loss"
    return [
        {"step": entry["step"], "tokens": entry["step"] * tokens_per_step}
        | {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry}
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    ]


def _save(
    recipe: Recipe,
    model: MemoryLLMForCausalLM,
    tokenizer: Tokenizer,
    record: dict[str, Any],
    out: Path,
) -> None:
    model.to(getattr(torch, recipe.training.save_dtype))
    _check_finite(model)
    model.config.use_cache = True  # Trainer turns it off, and it would stay off in config.json
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    (out / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    model.save_pretrained(out)


def _check_finite(model: torch.nn.Module) -> None:
    bad: Sequence[str] = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise RecipeError(
            f"{bad[0]} holds NaN or infinity after training. Lower the learning rate, or set "
            '[training] save_dtype = "float32".'
        )


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
