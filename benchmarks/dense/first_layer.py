"""Only the first layer's feed-forward network becomes a table: what it costs, and what it saves.

It is the one layer that the token nearly decides, so this is conversion where it is at its best.
Beside the table stand, as its control, some neurons of the layer without rows. All are made by
regression; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from benchmarks.dense.first_export import compare, export_pair
from benchmarks.dense.judging import Logits, difference, window_losses
from benchmarks.dense.kept import kept
from benchmarks.dense.texts import Windows, cut_windows, read_documents, two_sides
from benchmarks.environment import environment
from edge_memllm.modeling.conversion import dense_network
from edge_memllm.modeling.data import read_tokenizer
from edge_memllm.modeling.fitting import TokenGroups, planted, split_neurons
from edge_memllm.modeling.network import SwiGLU
from edge_memllm.modeling.token_means import Occurrences, token_means

_BATCH = 16  # windows in the layer at once
_ROWS = "rows.safetensors"
EXPORTED = {"graph_weights": "int4", "graph_method": "rtn", "table_codec": "int8"}
ROUNDS = 9


@dataclass(frozen=True)
class Size:
    """Windows that rows come from, those of them that neurons are chosen by, held-out ones."""

    learned: int = 1024
    fitted: int = 256
    held_out: int = 24
    documents: int = 160
    length: int = 256
    narrow: int = 192


@dataclass(frozen=True)
class Replacement:
    """What stands in place of the network: some neurons or none, and a row for each token [V, D].

    Without rows only the token that begins a window has its constant, as the control's may.
    """

    neurons: SwiGLU | None
    rows: torch.Tensor
    strength: float

    def __call__(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the layer reads [B, T, D], at tokens [B, T] -> what it puts out."""
        rows = functional.embedding(ids, self.rows)
        return rows if self.neurons is None else rows + self.neurons(x)


def first_layer(
    model: Path, texts: Sequence[Path], runs: Path, size: Size, only: str | None = None
) -> dict[str, Any]:
    """Fit and judge all replacements, then export the table and measure what it saves.

    What is in ``runs`` already is not done again. ``only`` names one replacement, which may be made
    beside the others; then nothing is returned.
    """
    network = dense_network(model)
    tokenizer = read_tokenizer(model / "tokenizer.json")
    sides = [two_sides(read_documents(path, size.length, size.documents)) for path in texts]
    cut = partial(
        cut_windows,
        tokenizer=tokenizer,
        boundary=int(network.config.bos_token_id),
        length=size.length,
    )
    learned = cut([text for side, _ in sides for text in side], count=size.learned)
    held_out = cut([text for _, side in sides for text in side], count=size.held_out)
    bench = _Bench(network, learned, held_out, runs, size)
    if only is not None:
        bench.measured([only])
        return {}
    found = bench.measured(list(bench.kinds))
    return found | {
        "artifacts": kept(runs, "artifacts", partial(bench.saved, model)),
        "size": asdict(size),
        "model": {
            "layers": network.config.num_hidden_layers,
            "width": network.config.hidden_size,
            "neurons": network.config.intermediate_size,
            "vocabulary": network.config.vocab_size,
            "parameters": sum(weight.numel() for weight in network.parameters()),
        },
        "environment": environment(("torch", "transformers", "edge-memllm")),
    }


class _Bench:
    def __init__(
        self, network: Any, learned: Windows, held_out: Windows, runs: Path, size: Size
    ) -> None:
        self.network, self.learned, self.held_out = network, learned, held_out
        self.runs, self.size = runs, size
        few = f"{size.narrow} neurons"
        self.kinds: Mapping[str, tuple[int, Unseen | None]] = {
            "table": (0, in_the_text),
            "table, other tokens alone": (0, alone),
            few: (size.narrow, None),
            "nothing": (0, None),
        }

    def measured(self, kinds: Sequence[str]) -> dict[str, Any]:
        plain = partial(_logits, self.network)
        dense = kept(self.runs, "dense", lambda: window_losses(plain, self.held_out).tolist())
        found = {}
        for kind in kinds:
            each = kept(
                self.runs, kind.replace(",", "").replace(" ", "-"), partial(self._judged, kind)
            )
            gap = difference(each["losses"], dense, self.held_out.document.tolist())
            found[kind] = {"strength": each["strength"], "difference": asdict(gap)}
        texts = [windows.ids[:, 1:] for windows in (self.learned, self.held_out)]
        seen = torch.isin(texts[1], texts[0].unique())
        return {
            "dense": sum(dense) / len(dense),
            "documents": self.held_out.documents,
            "tokens": {"learned": texts[0].numel(), "judged": texts[1].numel()},
            "seen": float(seen.float().mean()),
            "replacements": found,
        }

    def saved(self, model: Path) -> dict[str, Any]:
        """Sizes and speed of the model with the table, beside itself as it is."""
        rows = load_file(self.runs / _ROWS)["rows"]
        return compare(*export_pair(model, rows, self.runs / "artifacts", **EXPORTED), ROUNDS)

    def _judged(self, kind: str) -> dict[str, Any]:
        made = replacement(self.network, self.learned.ids, *self.kinds[kind], self.size.fitted)
        if kind == "table":
            self.runs.mkdir(parents=True, exist_ok=True)
            save_file({"rows": made.rows}, self.runs / _ROWS)
        with replaced(self.network, made) as logits:
            losses = window_losses(logits, self.held_out)
        return {"losses": losses.tolist(), "strength": made.strength}


@torch.no_grad()
def replacement(
    network: Any, ids: torch.Tensor, width: int, unseen: Unseen | None, fitted: int
) -> Replacement:
    """Keep ``width`` neurons of the first layer, and give tokens rows by windows [W, T], or none.

    ``fitted`` windows choose the neurons; all of them make the rows, and ``unseen`` those of tokens
    that they lack.
    """
    layer, vocabulary = network.model.layers[0], network.config.vocab_size
    neurons: SwiGLU | None = None
    if width:
        some = ids[torch.linspace(0, len(ids) - 1, min(fitted, len(ids))).round().long()]
        parts = [_inside(network, part) for part in some.split(_BATCH)]
        read = torch.cat([x[:, 1:].flatten(0, 1) for x, _ in parts])
        wanted = torch.cat([y[:, 1:].flatten(0, 1) for _, y in parts])
        groups = TokenGroups(some[:, 1:].flatten(), vocabulary) if unseen else None
        chosen, weights = split_neurons(layer.mlp, width, read, wanted, groups)
        neurons = SwiGLU(network.config.hidden_size, width).requires_grad_(False)
        neurons.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[chosen])
        neurons.up_proj.weight.copy_(layer.mlp.up_proj.weight[chosen])
        neurons.down_proj.weight.copy_(weights.T)
    return _with_rows(network, ids, neurons, unseen)


def _with_rows(
    network: Any, ids: torch.Tensor, neurons: SwiGLU | None, unseen: Unseen | None
) -> Replacement:
    vocabulary, width = network.config.vocab_size, network.config.hidden_size
    table = torch.zeros(vocabulary, width)
    strength = 0.0
    if unseen is not None:
        seen = Occurrences.none(vocabulary, width, table)
        for part in ids.split(_BATCH):
            missing = _missing(network, part, neurons)
            seen.add(part[:, 1:].flatten(), missing[:, 1:].flatten(0, 1))
        best = token_means(seen, [unseen(network, ids, neurons), seen.mean()])
        table, strength = best.rows, best.strength
    table[ids[0, 0]] = _missing(network, ids[:1, :1], neurons)[0, 0]
    return Replacement(neurons, table, strength)


# Rows [V, D] of all tokens by a network, windows and the neurons that stay: what is missing.
Unseen = Callable[[Any, torch.Tensor, SwiGLU | None], torch.Tensor]


def alone(network: Any, ids: torch.Tensor, neurons: SwiGLU | None) -> torch.Tensor:
    """What is missing of every token behind the boundary alone [V, D]."""
    tokens = torch.arange(network.config.vocab_size)
    found = []
    for part in tokens.split(_BATCH * 256):
        pairs = torch.stack([torch.full_like(part, int(ids[0, 0])), part], dim=1)
        found.append(_missing(network, pairs, neurons)[:, 1])
    return torch.cat(found)


def in_the_text(network: Any, ids: torch.Tensor, neurons: SwiGLU | None) -> torch.Tensor:
    """What is missing of every token in the place of another in the text [V, D], once each."""
    tokens = int(network.config.vocab_size)
    windows, places = planted(ids, tokens)
    found = [
        _missing(network, part, neurons)[:, places].flatten(0, 1) for part in windows.split(_BATCH)
    ]
    return torch.cat(found)[:tokens]


def _missing(network: Any, ids: torch.Tensor, neurons: SwiGLU | None) -> torch.Tensor:
    """What the layer puts out more than its neurons that stay [W, T, D]."""
    read, output = _inside(network, ids)
    return output if neurons is None else output - neurons(read)


@torch.no_grad()
def _inside(network: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer's feed-forward network reads and puts out [W, T, D]."""
    layer = network.model.layers[0]
    stream = network.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = network.model.rotary_emb(stream, position_ids=positions)
    attention = {"attention_mask": None, "position_embeddings": rotary}
    stream = stream + layer.self_attn(layer.input_layernorm(stream), **attention)[0]
    read = layer.post_attention_layernorm(stream)
    return read, layer.mlp(read)


@contextmanager
def replaced(network: Any, made: Replacement) -> Iterator[Logits]:
    """Give the logits of windows [B, T] by the network with its first layer replaced."""
    ids: list[torch.Tensor] = []

    def hooked(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return made(args[0], ids[-1])

    handle = network.model.layers[0].mlp.register_forward_hook(hooked)

    def logits(windows: torch.Tensor) -> torch.Tensor:
        ids.append(windows)
        return _logits(network, windows)

    try:
        yield logits
    finally:
        handle.remove()


def _logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = network(input_ids=ids, use_cache=False).logits
    return found
