"""A family of its own, for tests alone: what the shipped ones do not have.

Rows are half as wide as the stream and gate what is computed; its two layers store keys and values
of different shapes, and the second looks at a window of positions.

    x = x + W_o attention(RMSNorm(x));  x = x + W_u (sigmoid(W_g x) * gain row);  tied head
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig

from edge_memllm.arrays import Floats, Ids
from edge_memllm.artifact.model_spec import CacheSpec, MemorySpec, ModelSpec
from edge_memllm.modeling import TokenRows
from edge_memllm_export.architectures.architecture import Source, StoredKV, Weights
from edge_memllm_export.architectures.mapped_weights import weight_array
from edge_memllm_export.graph.attention import Attention, AttentionShape, AttentionWeights, Rotary
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.step import StepInputs, wanted_positions
from edge_memllm_export.graph.tokens import gained_weights, layer_memory, layer_weights
from edge_memllm_runtimes.torch_reference import TorchReference
from support.checkpoints import BOS, EOS, VOCABULARY, raw_byte_tokenizer

MODEL_TYPE = "gated_test"
WIDTH, ROW, CONTEXT = 64, 32, 400
SHAPES = (AttentionShape(4, 2, 16), AttentionShape(4, 1, 32, window=8))
GAIN = (0.75, 1.5)
_EPSILON = 1e-5
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def rotary(shape: AttentionShape) -> Rotary:
    """Angles of every position, the slower the farther back in a head."""
    turns = 100.0 ** (-np.arange(shape.head_dim // 2) / (shape.head_dim // 2))
    angles = np.outer(np.arange(CONTEXT), turns).astype(np.float32)
    return Rotary(np.cos(angles), np.sin(angles))


class Layer(nn.Module):
    """One layer of the drawing above."""

    def __init__(self, number: int) -> None:
        super().__init__()
        shape = self.shape = SHAPES[number]
        self.number = number
        heads, shared = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.norm = nn.RMSNorm(WIDTH, eps=_EPSILON)
        self.q_proj, self.o_proj = (
            nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, heads), (heads, WIDTH))
        )
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, shared, bias=False) for _ in range(2))
        self.gate, self.up = (
            nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, ROW), (ROW, WIDTH))
        )

    def forward(
        self, x: torch.Tensor, rows: torch.Tensor, cache: DynamicCache | None
    ) -> torch.Tensor:
        """``x`` [B, T, D] and the rows [B, T, W] of its tokens, gain applied."""
        x = x + self.o_proj(self._attended(self.norm(x), cache))
        return x + self.up(torch.sigmoid(self.gate(x)) * rows)

    def _attended(self, x: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        past = 0 if cache is None else cache.get_seq_length(self.number)
        positions = past + torch.arange(x.shape[1])
        query, key = (self._turned(each(x), positions) for each in (self.q_proj, self.k_proj))
        value = self._apart(self.v_proj(x))
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        distance = positions[:, None] - torch.arange(key.shape[2])
        seen = (distance >= 0) & (distance < (self.shape.window or CONTEXT))
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)

    def _apart(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def _turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = rotary(self.shape)
        cosine, sine = (torch.from_numpy(each)[positions] for each in (angles.cosine, angles.sine))
        first, second = self._apart(x).chunk(2, dim=-1)
        turned = first * cosine - second * sine, second * cosine + first * sine
        return torch.cat(turned, dim=-1)


class Network(nn.Module):
    """The family's network; a `RowNetwork` of the judge."""

    cache_shapes = tuple((shape.kv_heads, shape.head_dim) for shape in SHAPES)
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.rows = nn.Embedding(VOCABULARY, len(SHAPES) * ROW)
        self.layers = nn.ModuleList(Layer(number) for number in range(len(SHAPES)))
        self.norm = nn.RMSNorm(WIDTH, eps=_EPSILON)
        self.config = LlamaConfig(
            num_hidden_layers=len(SHAPES), max_position_embeddings=CONTEXT, vocab_size=VOCABULARY
        )

    def forward(
        self,
        *,
        token_rows: TokenRows,
        memory_gain: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool = False,
        logits_to_keep: torch.Tensor | None = None,
    ) -> Any:
        """See `RowNetwork`."""
        x = functional.embedding(token_rows.index, token_rows.embedding)
        gain = GAIN if memory_gain is None else memory_gain
        for layer in self.layers:
            rows = token_rows.memory[:, layer.number] * gain[layer.number]
            x = layer(x, functional.embedding(token_rows.index, rows), cache)
        x = x if logits_to_keep is None else x[:, logits_to_keep]
        return SimpleNamespace(logits=self.head(x))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of ``x`` [..., D]."""
        return functional.linear(self.norm(x), self.embed_tokens.weight)


class Gated:
    """See `Architecture`."""

    fields: Mapping[str, Any] = {"eos_token_id": EOS}
    facts: Mapping[str, Any] = {"family": MODEL_TYPE}
    kinds = ("qkv_proj", "o_proj", "gate", "up", "lm_head")
    delicate_kinds = ()
    rotary_values = sum(shape.head_dim for shape in SHAPES)

    def __init__(self, source: Source) -> None:
        expected = dict(Network().named_parameters())
        self.weights: Weights = source.weights(expected, tied=True, described="gated")

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            identity="",
            architecture=MODEL_TYPE,
            hidden_size=WIDTH,
            num_hidden_layers=len(SHAPES),
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            bos_token_id=BOS,
            eos_token_ids=(),
            memory=MemorySpec(len(SHAPES), ROW, "gate", GAIN),
            caches=tuple(
                CacheSpec(layer, each.kv_heads, each.head_dim, each.window)
                for layer, each in enumerate(SHAPES)
            ),
            details={"odd": True, "layers_with_windows": 1},
        )

    def limited(self, context: int) -> Gated:
        assert context == CONTEXT
        return self

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def makes_rows(self, weight: str) -> bool:
        return weight == "rows.weight"

    @property
    def row_table(self) -> str | None:
        return None

    def parts(self, matrix: str) -> tuple[str, ...]:
        return tuple(_names(matrix))

    def arranged(self, matrix: str, values: np.ndarray, side: str) -> np.ndarray:
        return values

    def folding(self, matrix: str) -> None:
        return None

    def folded(self, factors: Mapping[str, Floats]) -> Gated:
        return self

    def build(self, graph: GraphBuilder, step: StepInputs) -> ir.Value:
        x, pending = step.tokens.embedding, None
        assert step.tokens.memory is not None and step.tokens.gain is not None
        gains = gained_weights(graph, step.tokens.gain, np.ones((len(SHAPES), WIDTH)))
        for layer, shape in enumerate(SHAPES):
            path, name = f"/layers.{layer}", f"layers.{layer}"
            attention = Attention(graph, step, shape, rotary(shape), f"{name}.")
            weights = {each: self._array(f"{name}.{each}.weight") for each in _PROJECTIONS}
            normed, x = graph.add_norm(
                f"{path}/norm", x, pending, self._array(f"{name}.norm.weight"), _EPSILON
            )
            attended = attention(layer, path, normed, AttentionWeights(weights))
            x = graph.op(f"{path}/Add", "Add", [x, attended])
            gate = graph.linear(f"{path}/gate", x, self._array(f"{name}.gate.weight"))
            row = layer_memory(graph, step.tokens.memory, layer)
            opened = graph.op(f"{path}/Sigmoid", "Sigmoid", [gate])
            product = graph.op(f"{path}/gate/Mul", "Mul", [opened, row])
            pending = graph.linear(f"{path}/up", product, self._array(f"{name}.up.weight"))
            gain = layer_weights(graph, gains, layer)
            pending = graph.op(f"{path}/up/Mul", "Mul", [pending, gain])
        assert pending is not None
        x, pending = wanted_positions(graph, step, x=x, pending=pending)
        normed, _ = graph.add_norm("/norm", x, pending, self._array("norm.weight"), _EPSILON)
        return graph.linear("/lm_head", normed, self._array("embed_tokens.weight"))

    def reference(self, device: str = "cpu", compute_dtype: Any = None) -> GatedReference:
        network = Network()
        network.load_state_dict(dict(self.weights))
        return GatedReference(network.requires_grad_(False).eval())

    def _array(self, name: str) -> np.ndarray:
        return weight_array(self.weights[name])


class GatedReference:
    """See `Reference`; the family's rows are a slice of a weight."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = network.embed_tokens.weight

    def modules(self, matrix: str) -> list[nn.Module]:
        if matrix == "lm_head.weight":
            return [self.head]
        return [self.network.get_submodule(each.removesuffix(".weight")) for each in _names(matrix)]

    def predicted(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.network.embed_tokens(ids)
        rows = self.network.rows(ids).unflatten(-1, (-1, ROW))
        for layer in self.layers:
            x = layer(x, rows[:, :, layer.number] * GAIN[layer.number], None)
        return self.head(self.network.norm(x))

    def rows(self, chunk: int | None = None) -> Any:
        return SliceRows(self.network)

    def logits(self, ids: Sequence[int], chunk: int) -> Iterator[Floats]:
        whole = self.fed_logits(ids, *next(SliceRows(self.network).chunks(np.unique(ids))))
        for start in range(0, len(ids), chunk):
            yield whole[start : start + chunk]

    def fed_logits(self, ids: Sequence[int], embedding: Floats, rows: Floats) -> Floats:
        index = np.unique(np.asarray(ids), return_inverse=True)[1].reshape(1, -1)
        fed = TokenRows(*map(torch.from_numpy, (index, embedding, rows)))
        with torch.inference_mode():
            return self.network(token_rows=fed).logits[0].numpy()

    def runtime(self) -> Any:
        return TorchReference(self.network)

    def run(self, ids: torch.Tensor) -> None:
        next(self.logits(ids[0].tolist(), 1))

    def stored(self) -> list[StoredKV]:
        return [StoredKV(each.k_proj, each.v_proj, each.shape.kv_heads) for each in self.layers]

    @property
    def layers(self) -> Any:
        return self.network.layers


def _names(matrix: str) -> list[str]:
    """The weights that make up a matrix of the graph."""
    if matrix == "lm_head.weight":
        return ["embed_tokens.weight"]
    path, kind, _ = matrix.rsplit(".", 2)
    parts = ["q_proj", "k_proj", "v_proj"] if kind == "qkv_proj" else [kind]
    return [f"{path}.{part}.weight" for part in parts]


class SliceRows:
    """See `edge_memllm.table.source.Rows`."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def embeddings(self, ids: Ids) -> Floats:
        return self._network.embed_tokens.weight.numpy()[ids]

    def rows(self, ids: Ids) -> Floats:
        return self._network.rows.weight.numpy()[ids].reshape(len(ids), -1, ROW)

    def chunks(self, order: Ids) -> Iterator[tuple[Floats, Floats]]:
        for ids in np.array_split(order, max(1, len(order) // 128)):
            yield self.embeddings(ids), self.rows(ids)


def write_gated(path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of the family with random weights into the new folder ``path``."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in Network().named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        scale = weight.shape[-1] ** -0.5
        weights[name] = 1 + 0.2 * noise if weight.dim() == 1 else noise * scale * 2
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE}))
    raw_byte_tokenizer().save(str(path / "tokenizer.json"))
    return path
