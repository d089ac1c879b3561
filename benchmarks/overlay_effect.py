"""What an overlay changes: probabilities of words after prompts, and predictions of a whole text.

    python benchmarks/overlay_effect.py ARTIFACT OVERLAY [--ask PROMPT WORD[,WORD...]] [--text FILE]

Words are tokens as the command line names them (with a space before, where there is such a token).
The text is read in windows that do not overlap. Its predictions are told apart by how long ago a
token was read whose rows the overlay changes: at the last position, within 16 before, earlier in
the window, not at all. Tokens, perplexity without and with the overlay, and the mean KL divergence
from the predictions without it, in nats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edge_memllm
from edge_memllm.cli.output import read_text
from edge_memllm.engine.feeding import Feeder
from edge_memllm.evaluation.perplexity import divergences, text_tokens
from edge_memllm.overlays import open_overlay
from edge_memllm.sampling import next_token_losses
from edge_memllm.table.source import RecordSource
from edge_memllm.text.token_texts import TokenTexts

NEAR = 16
GROUPS = ("changed token just read", f"within {NEAR} before", "earlier in the window", "not read")
_CHUNK = 64

Model = edge_memllm.Model


def probabilities(model: Model, table: RecordSource, prompt: str) -> np.ndarray:
    """Of the next token, float64 [V]."""
    with Feeder(model.runtime, table, 1, model.prefill_chunk) as feeder:
        logits = feeder.prefill(0, model.tokenize(prompt)).astype(np.float64)
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum())


def asked(
    model: Model, sources: Sequence[RecordSource], prompt: str, words: str
) -> dict[str, list[float]]:
    texts = TokenTexts(model.tokenizer, model.manifest.model.vocab_size)
    found = [probabilities(model, source, prompt) for source in sources]
    return {word: [float(each[texts.find(word)]) for each in found] for word in words.split(",")}


def logits_of(model: Model, table: RecordSource, window: Sequence[int]) -> Iterator[np.ndarray]:
    with Feeder(model.runtime, table, 1, _CHUNK) as feeder:
        for start in range(0, len(window), _CHUNK):
            yield feeder.score(0, window[start : start + _CHUNK])


def group_of(window: Sequence[int], changed: np.ndarray) -> np.ndarray:
    """The group of the prediction at each position."""
    positions = np.arange(len(window))
    last = np.maximum.accumulate(np.where(changed[np.asarray(window)], positions, -1))
    ago = positions - last
    return np.select([last < 0, ago == 0, ago <= NEAR], [3, 0, 1], 2)


def text_effect(
    model: Model, sources: Sequence[RecordSource], text: str, changed: np.ndarray
) -> list[dict[str, Any]]:
    fed = text_tokens(model, text).fed
    context = model.manifest.model.max_position_embeddings
    parts = []
    for begin in range(0, len(fed) - 1, context):
        window, targets = fed[begin : begin + context], fed[begin + 1 : begin + context + 1]
        groups = group_of(window, changed)
        both = (logits_of(model, source, window[: len(targets)]) for source in sources)
        for number, (plain, laid) in enumerate(zip(*both, strict=True)):
            part = slice(number * _CHUNK, number * _CHUNK + len(plain))
            losses = [next_token_losses(each, targets[part]) for each in (plain, laid)]
            parts.append(np.stack([groups[part], *losses, divergences(plain, laid)]))
    values = np.concatenate(parts, axis=1)
    shown = [(name, values[:, values[0] == number]) for number, name in enumerate(GROUPS)]
    return [figures(name, each) for name, each in [*shown, ("all", values)] if each.size]


def figures(name: str, values: np.ndarray) -> dict[str, Any]:
    before, after = np.exp(values[1:3].mean(axis=1)).tolist()
    return {
        "predictions": name,
        "tokens": values.shape[1],
        "perplexity": [before, after],
        "mean_kl": float(values[3].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--ask", nargs=2, action="append", default=[], metavar=("PROMPT", "WORDS"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    overlay = open_overlay(given.overlay)
    found: dict[str, Any] = {"asked": {}, "text": []}
    with edge_memllm.load(given.artifact, threads=given.threads) as model:
        plain = model.source
        model.add_overlay(overlay)
        sources = (plain, model.source)
        for prompt, words in given.ask:
            found["asked"][prompt] = asked(model, sources, prompt, words)
        if given.text is not None:
            changed = np.zeros(model.manifest.model.vocab_size, np.bool_)
            changed[overlay.entries.tokens] = True
            found["text"] = text_effect(model, sources, read_text(given.text), changed)
    print(json.dumps(found, indent=2) if given.json else page(found))


def page(found: dict[str, Any]) -> str:
    lines = []
    for prompt, words in found["asked"].items():
        for word, (before, after) in words.items():
            lines.append(f"{prompt!r}  {word:<12}{before:8.4f} -> {after:.4f}")
    for each in found["text"]:
        before, after = each["perplexity"]
        lines.append(
            f"{each['predictions']:<26}{each['tokens']:>9,}{before:9.2f} -> {after:<9.2f}"
            f"{each['mean_kl']:.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
