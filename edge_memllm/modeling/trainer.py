"""Hugging Face's Trainer with the family's loss, and its arguments from a recipe."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.network import UNDECAYED
from edge_memllm.modeling.recipe import Recipe

_ROWS = 256  # positions per stretch: its float32 logits stay in the cache of a CPU core
_NOTHING = -1  # the target of a sequence's last position


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Mean over positions of ``-log p(label) + z_loss * log(Z)^2``, in float32.

    ``logits`` [B, T, V] and ``labels`` [B, T] at the same positions: labels are shifted here,
    and the last logit of each sequence has nothing to predict. One backward pass only.
    """
    # Labels move and logits stay: a shifted copy of the logits would be the largest array here.
    target = functional.pad(labels[:, 1:], (0, 1), value=_NOTHING)
    return _CrossEntropy.apply(logits.flatten(0, 1), target.flatten(), z_loss)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over stretches of positions.

    The plain form keeps several [B * T, V] float32 arrays for the backward pass; this one keeps
    the gradient alone, in the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, z_loss: float
    ) -> torch.Tensor:
        counted = (target != _NOTHING).unsqueeze(-1)
        label = target.clamp(min=0).unsqueeze(-1)
        count = counted.sum()
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits)
        for start in range(0, len(target), _ROWS):
            rows = slice(start, start + _ROWS)
            stretch = logits[rows].to(torch.float32, copy=True)  # it is worked on in place
            share = counted[rows] / count
            log_z = torch.logsumexp(stretch, dim=-1, keepdim=True)
            loss = log_z - stretch.gather(-1, label[rows]) + z_loss * log_z.square()
            total += (loss * share).sum()
            # d/dx = softmax(x) * (1 + 2 z log Z) - onehot
            stretch = stretch.sub_(log_z).exp_().mul_(1 + 2 * z_loss * log_z)
            stretch.scatter_add_(-1, label[rows], torch.full_like(log_z, -1.0))
            gradient[rows] = stretch.mul_(share)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0]), None, None


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


class TrainingProgress(TrainerCallback):
    """Shows a bar on standard error.

    ``tokens_per_step`` counts all processes. The speed is that of the steps of this run since
    the last log, evaluation and saving left out by restarting the clock after them.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.bar: tqdm | None = None
        self._mark = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
            )
        self._restart(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss and the speed, or an evaluation's loss."""
        if self.bar is None:
            return
        if "loss" in logs:
            steps, since = state.global_step - self._mark[0], time.monotonic() - self._mark[1]
            speed = steps * self.tokens_per_step / since if since > 0 else 0.0
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")
            self._restart(state)
        elif "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: valid loss {logs['eval_loss']:.4f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out of the speed."""
        self._restart(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the saving out of the speed."""
        self._restart(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _restart(self, state: Any) -> None:
        self._mark = (state.global_step, time.monotonic())
