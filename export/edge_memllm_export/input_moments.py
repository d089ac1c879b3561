"""What each matrix of the graph is fed: second moments of its inputs on a text, layer by layer.

The network is walked once, all windows of the text through one layer at a time, so that the
moments of one layer and the residual stream are all that is alive. Inputs are those of the
network itself, not of layers that are already quantised: measured, that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import create_causal_mask

from edge_memllm.errors import ExportError
from edge_memllm.modeling import MemoryLLMForCausalLM
from edge_memllm.modeling.cache_argument import CACHE
from edge_memllm.modeling.token_memory import rows_of_layer
from edge_memllm_export.graph_attention import AttentionShape, widen_heads

_WINDOW = 256
_BATCH = 8  # windows in a layer at once
_ROWS = 1024  # tokens whose memory is computed at once
# Matrix of the graph -> the module whose input it reads. `projections` are themselves.
_READERS = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
    "mlp.projections.0": "mlp.projections.0",
    "mlp.projections.1": "mlp.projections.1",
}

Progress = Callable[[int], None]


class InputMoments:
    """Second moments by the names of the graph's matrices, asked for in the graph's order."""

    def __init__(
        self, network: MemoryLLMForCausalLM, tokens: list[int], progress: Progress
    ) -> None:
        self._walk = _moments(network, tokens, progress)
        self._found: dict[str, np.ndarray] = {}

    def of(self, name: str) -> np.ndarray:
        """``X^T X / n`` float32 [K, K] of what the matrix ``name`` reads, in the graph's columns.

        Goes on to the layer of this matrix and forgets the one before. Raises ExportError when
        an input is not finite.
        """
        while name not in self._found:
            self._found = next(self._walk)
        moment = self._found[name]
        if not np.isfinite(moment).all():
            raise ExportError(
                f"{name}: what the network feeds this matrix on the calibration text is not "
                "finite. Mend the checkpoint, or export with the graph method rtn."
            )
        return moment


@torch.no_grad()
def _moments(
    network: MemoryLLMForCausalLM, tokens: list[int], progress: Progress
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the moments of every layer's matrices, then that of the head."""
    model, config = network.model, network.config
    window = min(_WINDOW, len(tokens), config.max_position_embeddings)
    ids = torch.tensor(tokens[: len(tokens) // window * window]).view(-1, window)
    distinct, index = torch.unique(ids, return_inverse=True)
    embedding = model.embed_tokens(distinct)
    parts = index.split(_BATCH)
    stream = [functional.embedding(part, embedding) for part in parts]
    source, shared = model.token_memory(distinct, embedding)
    for number, layer in enumerate(model.layers):
        rows = _memory(layer, source, rows_of_layer(shared, number)) if config.has_memory else None
        found, hooks = _listen(layer)
        for place, (x, part) in enumerate(zip(stream, parts, strict=True)):
            fed = part, None, rows, model.memory_gain(number)
            stream[place] = layer(x, *fed, **_attention(model, config, x))
        for hook in hooks:
            hook.remove()
        yield _named(found, f"model.layers.{number}", ids.numel(), config)
        progress(number + 1)
    found = {}
    for x in stream:
        _add_moment(found, "lm_head", network.lm_head, (model.norm(x),))
    yield _named(found, "", ids.numel(), config)


def _attention(model: Any, config: Any, x: torch.Tensor) -> dict[str, Any]:
    """What the network gives the attention of each layer, for a batch [B, T, D] from the start."""
    positions = torch.arange(x.shape[1]).unsqueeze(0)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=x,
        attention_mask=None,
        position_ids=positions,
        **{CACHE: None},
    )
    rotary = model.rotary_emb(x, position_ids=positions)
    return {"attention_mask": mask, "position_embeddings": rotary, CACHE: None}


def _memory(layer: Any, source: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The layer's memory rows [U, D] from what ``TokenMemory`` gives for the tokens."""
    parts = source.split(_ROWS)
    ready = [None] * len(parts) if rows is None else rows.split(_ROWS)
    found = [layer.recall(part, own) for part, own in zip(parts, ready, strict=True)]
    return torch.cat([memory.float() for memory in found])


def _listen(layer: nn.Module) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Sums of ``x x^T`` by matrix, growing as the layer is run, until the hooks are removed."""
    sums: dict[str, torch.Tensor] = {}
    modules = dict(layer.named_modules())
    present = [(name, modules[path]) for name, path in _READERS.items() if path in modules]
    return sums, [
        module.register_forward_pre_hook(partial(_add_moment, sums, name))
        for name, module in present
    ]


def _add_moment(
    sums: dict[str, torch.Tensor], name: str, _: nn.Module, inputs: tuple[torch.Tensor]
) -> None:
    x = inputs[0].float().flatten(0, 1)
    if name not in sums:
        sums[name] = x.new_zeros(x.shape[1], x.shape[1])
    sums[name].addmm_(x.T, x)


def _named(
    sums: dict[str, torch.Tensor], path: str, count: int, config: Any
) -> dict[str, np.ndarray]:
    """Moments by the names of the graph's initialisers, in its columns."""
    shape = AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    named = {}
    for name, total in sums.items():
        moment = total.div_(count).numpy()
        if name == "self_attn.o_proj":
            moment = widen_heads(widen_heads(moment, shape).T, shape)
        named[f"{path}.{name}.weight".lstrip(".")] = moment
    return named
