"""Recipe to checkpoint: tokenizer, token files, network, Hugging Face Trainer, saved weights.

One process, several GPUs and FSDP are the same call: ``accelerate launch`` starts more of it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import GenerationConfig, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import MemoryLLMConfig
from edge_memllm.modeling.corpus import TokenWindows, documents, write_tokens
from edge_memllm.modeling.loss import next_token_loss
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

RECORD_FILE = "training.json"
_CHECKPOINTS = "checkpoints"


class LanguageModelTrainer(Trainer):
    """Hugging Face's Trainer with the family's loss; evaluation leaves the z-loss out."""

    def __init__(self, *args: Any, z_loss: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        # All sequences are equally long, so the mean of micro-batch means is the batch's mean.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Cross-entropy and, while training, the z-loss."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        z_loss = self.z_loss if model.training else 0.0
        loss = next_token_loss(outputs.logits, inputs["labels"], z_loss)
        return (loss, outputs) if return_outputs else loss


def train(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train what the recipe says into the folder ``out``; what was reached, as plain data.

    With ``steps = 0`` the initialised network is written, untrained. ``resume`` continues from
    the newest checkpoint under ``out``; without it an ``out`` that has one is refused.
    """
    recipe.validate()
    config = model_config(recipe)
    _check_target(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=not torch.cuda.is_available())
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
    arguments = _arguments(recipe, folder)
    if arguments.device.type == "cpu":
        _keep_freed_memory()
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


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    training = recipe.training
    cosine = {"min_lr": training.min_learning_rate}
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": training.steps,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": cosine,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": training.precision != "fp32",
        "seed": training.seed,
        "logging_steps": training.log_every,
        "eval_strategy": "steps" if recipe.data.valid else "no",
        "eval_steps": training.eval_every,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "save_total_limit": 2,
        "prediction_loss_only": True,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    try:
        return TrainingArguments(**{**fields, **recipe.trainer})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"[trainer] {error}") from error


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


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB, its largest threshold, for the next step.

    Handing them back and faulting them in again costs a fifth of a step. Larger blocks stay
    mappings of their own: kept on the heap as well, they fragment it without end.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
            libc.mallopt(m_mmap_threshold, 32 << 20)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_top_pad, 64 << 20)
