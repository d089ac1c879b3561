"""Training a student to compute what its dense teacher computes: predictions and hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edge_memllm.modeling.network import MemoryLLMForCausalLM
from edge_memllm.modeling.recipe import DistillationRecipe
from edge_memllm.modeling.trainer import LanguageModelTrainer, next_token_loss

_ROWS = 256  # positions per stretch: its float32 logits stay in the cache of a CPU core


@dataclass(frozen=True)
class LayerSchedule:
    """How many of a student's layers have taken over from the dense ones at a step.

    Stages of ``per_stage`` layers, the first layers first, are spread over the first half of the
    steps; then all have. 0 per stage: all have from the start.
    """

    layers: int
    per_stage: int
    steps: int

    def converted(self, step: int) -> int:
        """Layers that are the student's own at ``step``, counted from 0."""
        if not self.per_stage:
            return self.layers
        waiting = math.ceil(self.layers / self.per_stage) - 1
        stage = 1 + step * 2 * waiting // max(1, self.steps)
        return min(self.layers, stage * self.per_stage)


class DistillationTrainer(LanguageModelTrainer):
    """The family's Trainer with the losses of a distillation.

    Evaluation is the next-token loss of the student by itself, as for any network.
    """

    def __init__(
        self,
        *args: Any,
        teacher: MemoryLLMForCausalLM,
        distillation: DistillationRecipe,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device)
        self.distillation = distillation
        per_stage = distillation.layers_per_stage
        layers = len(teacher.model.layers)
        self.schedule = LayerSchedule(layers, per_stage, self.args.max_steps)
        self._wanted = _HiddenStates(teacher)
        student = self.model  # not wrapped yet for several devices
        if per_stage:
            for number, layer in enumerate(student.model.layers):
                layer.register_forward_hook(self._stand_in(number), with_kwargs=True)
        self._found = _HiddenStates(student)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Distance from the teacher while training, else the next-token loss."""
        if not model.training:
            loss = super().compute_loss(model, inputs, return_outputs)
            self._found.take()
            return loss
        device = self.args.device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self.args.bf16):
            target = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        converted = self.schedule.converted(self.state.global_step)
        pairs = zip(self._found.take()[:converted], self._wanted.take(), strict=False)
        hidden = [hidden_distance(found, wanted) for found, wanted in pairs]
        weights = self.distillation
        loss = weights.hidden_weight * torch.stack(hidden).mean()
        if weights.kl_weight:
            loss = loss + weights.kl_weight * divergence(outputs.logits, target)
        if weights.label_weight:
            labels = next_token_loss(outputs.logits, inputs["labels"], self.z_loss)
            loss = loss + weights.label_weight * labels
        return (loss, outputs) if return_outputs else loss

    def _stand_in(self, number: int) -> Any:
        """A hook by which the teacher's layer answers for the student's until that takes over."""

        def replaced(layer: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> Any:
            if not layer.training or number < self.schedule.converted(self.state.global_step):
                return output
            x, index = args[:2]
            return self.teacher.model.layers[number].forward(x, index, None, None, 1.0, **kwargs)

        return replaced


class _HiddenStates:
    """Keeps what the layers of a network put out, until it is taken."""

    def __init__(self, network: MemoryLLMForCausalLM) -> None:
        self._kept: list[torch.Tensor] = []
        for layer in network.model.layers:
            layer.register_forward_hook(lambda _, __, output: self._kept.append(output))

    def take(self) -> Sequence[torch.Tensor]:
        """The hidden states [B, T, D] of the last pass, by layer."""
        kept, self._kept = self._kept, []
        return kept


def hidden_distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over positions of ``|found - wanted|^2 / |wanted|^2``; both [B, T, D].

    Each position by its own measure: a few are many times as long as the others.
    """
    wanted = wanted.float()
    error = (found.float() - wanted).square().sum(dim=-1)
    return (error / wanted.square().sum(dim=-1).clamp_min(1e-12)).mean()


def divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over positions of KL(target || logits), in float32; both [B, T, V].

    One backward pass only, and none to ``target``.
    """
    return _Divergence.apply(logits.flatten(0, 1), target.flatten(0, 1))


class _Divergence(torch.autograd.Function):
    """Loss and gradient in one pass over stretches of positions, as in ``loss``."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            found = logits[rows].float().log_softmax(dim=-1)
            wanted = target[rows].float().log_softmax(dim=-1)
            likely = wanted.exp()
            total += (likely * (wanted - found)).sum() / len(logits)
            gradient[rows] = (found.exp() - likely) / len(logits)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0]), None
