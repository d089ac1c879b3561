"""Which feed-forward layers of a network are tables: what the token alone decides in each of them.

Measured in two ways on a held-out text: how much of a layer's output a row per token explains, and
how much the predictions lose when the layer's feed-forward network is replaced. Rows come of
another text. Windows begin with the token that begins a text; what a layer puts out there is the
same for every text, so that position is left as it is and counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edge_memllm.errors import ExportError
from edge_memllm.modeling.token_means import Occurrences, token_means
from edge_memllm.progress import Progress
from edge_memllm_export.checkpoint import Checkpoint

# Rows [B, T, D] of tokens [B, T].
Source = Callable[[torch.Tensor], torch.Tensor]
REPLACEMENTS = ("table", "dropped", "alone")
_POSITIONS = 1024  # of a batch
_CHARACTERS = 12  # of a token, at most, in a piece that a window is cut from


@dataclass(frozen=True)
class Damage:
    """Nats per token that a replacement costs.

    ``error`` is the standard error over windows, None of a single one.
    """

    nats: float
    error: float | None


@dataclass(frozen=True)
class LayerTable:
    """One layer.

    ``token_share`` is the R2 of the rows on the held-out text: 1 says that the output depends on
    nothing but the token, 0 that rows are no better than their mean, below 0 that they are worse.
    ``seen_share`` is the same over tokens that the rows' text has. ``shrinkage`` counts occurrences
    of the mean row that are added to those of a token, by leave-one-out on the rows' text.
    ``damage`` has an entry for each of ``REPLACEMENTS``: a row for each token, nothing, and what
    the layer gives for the token alone behind the token that begins a text. All of them replace the
    output where the token has a row, and leave it elsewhere.
    """

    layer: int
    token_share: float
    seen_share: float
    shrinkage: float
    damage: Mapping[str, Damage]


@dataclass(frozen=True)
class LayerTables:
    """All layers; ``loss`` is that of the network as it is, ``seen`` the share of tokens."""

    fit_tokens: int
    distinct: int
    judged_tokens: int
    window: int
    seen: float
    loss: float
    layers: Sequence[LayerTable]


def boundary_of(checkpoint: Checkpoint) -> int:
    """The token that begins a text, or else one that ends it; ExportError where none is named."""
    first = checkpoint.architecture.fields.get("bos_token_id")
    found = [*([] if first is None else [first]), *checkpoint.spec.eos_token_ids]
    if not found:
        raise ExportError(
            f"{checkpoint.path}: names neither bos_token_id nor eos_token_id, so nothing can begin "
            "a window. Add the one that its tokenizer uses to config.json."
        )
    return int(found[0])


def led_windows(
    encode: Callable[[str], Sequence[int]], text: str, boundary: int, length: int, most: int
) -> torch.Tensor:
    """Windows [W, T] of a text, each behind the boundary; at most ``most`` tokens, spread evenly.

    ``encode`` gives the tokens of a text, or of the pieces that windows are cut from: nobody waits
    for all of a large one.

    Raises:
        ExportError: The text has no whole window.
    """
    room = length - 1
    count, size = max(1, most // room), _CHARACTERS * length
    if len(text) <= count * size:
        tokens = encode(text)
        whole = len(tokens) // room
        count = min(whole, count)
        starts = [number * whole // count * room for number in range(count)]
        cut = [[boundary, *tokens[start : start + room]] for start in starts]
    else:
        cut = []
        for number in range(count):
            start = text.find(" ", number * (len(text) - size) // count)  # whole words
            tokens = encode(text[start : start + size]) if start >= 0 else []
            if len(tokens) >= room:
                cut.append([boundary, *tokens[:room]])
    if not cut:
        raise ExportError(
            f"the text of {len(text)} characters has no window of {length} tokens. Give more text, "
            "or a shorter window."
        )
    return torch.tensor(cut)


def measure_layers(
    network: Any,
    learned: torch.Tensor,
    judged: torch.Tensor,
    progress: Progress = lambda stage, done, total: None,
) -> LayerTables:
    """Measure a frozen causal network whose layers are ``network.model.layers``, each with a `mlp`.

    ``learned`` [W, T] makes the rows, ``judged`` [W', T] judges them; both as ``led_windows``
    gives them. Memory is that of the rows: distinct tokens x layers x width, float32.

    Raises:
        ExportError: A layer has no feed-forward network on the stream.
    """
    with torch.inference_mode():
        return _Measured(network, learned, judged, progress).all()


class _Shares:
    """What rows explain of the outputs of each layer: of all tokens, and of those with a row."""

    def __init__(self, layers: int) -> None:
        self._missed, self._length = torch.zeros(2, layers, 2, dtype=torch.float64)

    def add(self, layer: int, y: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Count outputs [B, T, D] of tokens with rows at ``places`` [B, T]; the last is none's."""
        known = places < len(rows) - 1
        y = y.float()
        for sums, other in (
            (self._missed, functional.embedding(places, rows)),
            (self._length, rows[-1]),
        ):
            squares = (y - other).square().sum(dim=2).double()
            sums[layer] += torch.stack([squares.sum(), (squares * known).sum()])

    def of(self, layer: int) -> tuple[float, float]:
        """The shares of a layer."""
        found = 1 - self._missed[layer] / self._length[layer].clamp_min(1e-30)
        return float(found[0]), float(found[1])


class _Measured:
    """The passes over both texts."""

    def __init__(
        self, network: Any, learned: torch.Tensor, judged: torch.Tensor, progress: Progress
    ) -> None:
        self._network, self._learned, self._judged = network, learned, judged
        self._progress = progress
        self._parts = _feed_forward(network)
        self._tokens, index = torch.unique(learned[:, 1:], return_inverse=True)
        self._index = index

    def all(self) -> LayerTables:
        """Everything that is measured."""
        rows, shrinkages = self._rows()
        sources = [
            {"table": self._table(table), "dropped": torch.zeros_like, "alone": alone}
            for table, alone in zip(rows, self._alone(), strict=True)
        ]
        losses = torch.zeros(1 + len(rows) * len(REPLACEMENTS), len(self._judged))
        shares = _Shares(len(rows))
        for places in torch.arange(len(self._judged)).split(_windows(self._judged)):
            losses[:, places] = self._judge(self._judged[places], rows, sources, shares)
            self._progress("judge", int(places[-1]) + 1, len(self._judged))
        gaps = (losses[1:] - losses[0]).view(len(rows), len(REPLACEMENTS), -1)
        layers = [
            LayerTable(
                number,
                *shares.of(number),
                shrinkage,
                {name: _damage(gap) for name, gap in zip(REPLACEMENTS, gaps[number], strict=True)},
            )
            for number, shrinkage in enumerate(shrinkages)
        ]
        known = self._place(self._judged[:, 1:]) < len(self._tokens)
        return LayerTables(
            fit_tokens=self._learned[:, 1:].numel(),
            distinct=len(self._tokens),
            judged_tokens=known.numel(),
            window=self._judged.shape[1],
            seen=float(known.float().mean()),
            loss=float(losses[0].mean()),
            layers=layers,
        )

    def _rows(self) -> tuple[list[torch.Tensor], list[float]]:
        """Rows [U + 1, D] of each layer, the last for all other tokens; and their shrinkages."""
        seen: list[Occurrences] = []
        done = 0
        for outputs, places in self._outputs(self._learned):
            index = self._index[places].flatten()
            for number, output in enumerate(outputs):
                y = output[:, 1:].flatten(0, 1)
                if number == len(seen):
                    seen.append(Occurrences.none(len(self._tokens), y.shape[1], y))
                seen[number].add(index, y)
            done += len(places)
            self._progress("rows", done, len(self._learned))
        rows, shrinkages = [], []
        for each in seen:
            mean = each.mean()
            best = token_means(each, [mean])
            rows.append(torch.cat([best.rows, mean.unsqueeze(0)]))
            shrinkages.append(best.strength)
        return rows, shrinkages

    def _alone(self) -> list[Source]:
        """What each layer gives for a token behind the boundary alone, for tokens [B, T]."""
        tokens = self._judged[:, 1:].unique()
        boundary = self._judged[:1, :1].expand(len(tokens), 1)
        found: list[list[torch.Tensor]] = [[] for _ in self._parts]
        for outputs, places in self._outputs(torch.cat([boundary, tokens.unsqueeze(1)], dim=1)):
            for kept, output in zip(found, outputs, strict=True):
                kept.append(output[:, 1].clone())
            self._progress("alone", int(places[-1]) + 1, len(tokens))

        def given(rows: torch.Tensor) -> Source:
            # The boundary, which windows begin with, has none; nor is it replaced.
            return lambda ids: rows[torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)]

        return [given(torch.cat(kept)) for kept in found]

    def _table(self, rows: torch.Tensor) -> Source:
        return lambda ids: functional.embedding(self._place(ids), rows)

    def _place(self, ids: torch.Tensor) -> torch.Tensor:
        """Where the rows of tokens are; behind the last for those that have none."""
        found = torch.searchsorted(self._tokens, ids.contiguous()).clamp(max=len(self._tokens) - 1)
        return torch.where(self._tokens[found] == ids, found, len(self._tokens))

    def _judge(
        self,
        ids: torch.Tensor,
        rows: Sequence[torch.Tensor],
        sources: Sequence[Mapping[str, Source]],
        shares: _Shares,
    ) -> torch.Tensor:
        """Losses [1 + L * R, B] of windows [B, T]: as it is, then layer by layer replaced."""
        known = self._place(ids) < len(self._tokens)
        known[:, 0] = False
        with _listening(self._network.model.layers) as streams, _listening(self._parts) as outputs:
            found = [self._losses(ids)]
        for number, output in enumerate(outputs):
            shares.add(number, output[:, 1:], rows[number], self._place(ids[:, 1:]))
        for number, source in enumerate(sources):
            for name in REPLACEMENTS:
                with (
                    self._replaced(number, source[name], ids, known),
                    self._skipped(streams, number),
                ):
                    found.append(self._losses(ids))
        return torch.stack(found)

    @contextmanager
    def _replaced(
        self, layer: int, source: Source, ids: torch.Tensor, where: torch.Tensor
    ) -> Iterator[None]:
        """Put other outputs in place of a layer's where ``where`` [B, T] is true."""

        def replaced(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            new = torch.zeros_like(output) if source is torch.zeros_like else source(ids)
            return torch.where(where.unsqueeze(-1), new.to(output.dtype), output)

        handle = self._parts[layer].register_forward_hook(replaced)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _skipped(self, streams: Sequence[Any], count: int) -> Iterator[None]:
        """Do not compute the first layers again, of which the last has put out this already.

        Not where later layers read their keys and values.
        """
        shared = getattr(self._network.config, "num_kv_shared_layers", 0)
        layers = [] if shared else list(self._network.model.layers)[:count]
        for layer in layers:
            layer.forward = lambda *_, **__: streams[count - 1]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _outputs(self, windows: torch.Tensor) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """What all layers put out [B, T, D] for some windows at a time, and their numbers [B]."""
        for places in torch.arange(len(windows)).split(_windows(windows)):
            with _listening(self._parts) as outputs:
                self._network.model(input_ids=windows[places], use_cache=False)
            yield outputs, places

    def _losses(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of each window, nats: [B, T] -> [B]."""
        logits = self._network(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(
            dim=1
        )


def _damage(gap: torch.Tensor) -> Damage:
    error = float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else None
    return Damage(float(gap.mean()), error)


def _windows(windows: torch.Tensor) -> int:
    return max(1, _POSITIONS // windows.shape[1])


def _feed_forward(network: Any) -> list[nn.Module]:
    """The feed-forward network of each layer."""
    found = [getattr(layer, "mlp", None) for layer in network.model.layers]
    if any(part is None for part in found):
        raise ExportError(
            f"layer {found.index(None)} has no feed-forward network on the stream: all of it is in "
            "the table already. edge-memllm explain looks into that."
        )
    return [part for part in found if part is not None]


@contextmanager
def _listening(parts: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Keep what each part puts out, in their order."""
    kept: list[torch.Tensor] = []
    handles = [
        part.register_forward_hook(lambda _, __, output: kept.append(output)) for part in parts
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
