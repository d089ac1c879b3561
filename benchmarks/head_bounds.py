"""Could greedy decoding do with less than the whole head, and still be exact? A count, no timing.

    python benchmarks/head_bounds.py CHECKPOINT [--text FILE] [--tokens 512]

The head is turned into the basis in which its columns weigh most first. Over the first r columns
every logit is computed; what the others can add is at most the product of two norms
(Cauchy-Schwarz), so a token whose bound is below an exactly computed logit cannot win. "read" is
the share of the head that is touched: r columns of all rows, the others of the rows that survive.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from edge_memllm.tokenization import Tokenizer
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.texts import judging_text

_RESCORED = 64  # the most promising rows are finished first: their best logit is the bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    text = arguments.text.read_text("utf-8") if arguments.text else judging_text()
    hidden, head = _hidden_and_head(arguments.checkpoint, text, arguments.tokens)
    rows, width = head.shape
    print(f"head {rows} x {width}, {len(hidden)} positions")
    basis = np.linalg.eigh(head.T @ head)[1][:, ::-1]
    print("columns   rows left   read")
    for share in (8, 4, 3, 2):
        columns = width // share
        left = _survivors(hidden @ basis, head @ basis, columns)
        print(f"{columns:7} {left:11.4f} {(columns + (width - columns) * left) / width:6.2f}")


def _hidden_and_head(path: Path, text: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    source = Checkpoint.open(path)
    ids = Tokenizer((source.path / "tokenizer.json").read_bytes()).encode(text)[:count]
    network = source.network()
    with torch.inference_mode():
        hidden = network.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return hidden.float().numpy(), network.lm_head.weight.float().numpy()


def _survivors(hidden: np.ndarray, head: np.ndarray, columns: int) -> float:
    """The share of rows [V] that may still win, over all positions [T]."""
    part = hidden[:, :columns] @ head[:, :columns].T
    rest = np.linalg.norm(head[:, columns:], axis=1)
    bound = part + np.linalg.norm(hidden[:, columns:], axis=1)[:, None] * rest
    promising = np.argpartition(-part, _RESCORED, axis=1)[:, :_RESCORED]
    bar = np.einsum("td,tkd->tk", hidden, head[promising]).max(axis=1, keepdims=True)
    return float((bound >= bar).mean())


if __name__ == "__main__":
    main()
