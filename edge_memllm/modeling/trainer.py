"""Hugging Face's Trainer with the family's loss, and its arguments from a recipe."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.loss import next_token_loss
from edge_memllm.modeling.recipe import Recipe
from edge_memllm.modeling.token_memory import UNDECAYED


class LanguageModelTrainer(Trainer):
    """Hugging Face's Trainer with the family's loss; evaluation leaves the z-loss out."""

    def __init__(self, *args: Any, z_loss: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        # All sequences are equally long, so the mean of micro-batch means is the batch's mean.
        self.model_accepts_loss_kwargs = False

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """The names that weight decay applies to: matrices that every step uses."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(UNDECAYED)]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches to evaluate on: all of the text, a rest smaller than a batch too."""
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropping

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


def training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """What Trainer is told; the recipe's ``[trainer]`` section has the last word."""
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
        "ddp_find_unused_parameters": False,  # every step uses all of them
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    try:
        return TrainingArguments(**{**fields, **recipe.trainer})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"[trainer] {error}") from error


def keep_freed_memory() -> None:
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
