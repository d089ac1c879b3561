"""What ``edge-memllm overlay`` tells: what was written, and what an overlay does."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact import Artifact
from edge_memllm.cli.text import byte_count, number, table, write_json
from edge_memllm.hub import artifact_folder
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.overlays import Overlay, OverlaySpec, Written, open_overlay
from edge_memllm.overlays.copying import Difference
from edge_memllm.tokenization import Tokenizer

Text = Callable[[int], str]

_MOST_TOKENS = 40  # shown; --json has all


def tell_written(written: Written, as_json: bool) -> None:
    """Say what was written."""
    if as_json:
        write_json(_written(written))
    else:
        print(table(_rows(written)))


def tell_difference(found: Difference, as_json: bool) -> None:
    """Say what was written, and how much differed."""
    if as_json:
        write_json({**_written(found.written), "compared": found.compared})
        return
    share = found.written.entries / found.compared
    compared = f"{number(found.written.entries)} of {number(found.compared)} rows ({share:.2%})"
    print(table([*_rows(found.written), ("differing", compared)]))


def show(arguments: argparse.Namespace) -> int:
    """Run ``overlay show``."""
    overlay = open_overlay(arguments.overlay)
    text: Text | None = None
    if arguments.artifact is not None:
        with Artifact.open(artifact_folder(arguments.artifact)) as artifact:
            overlay.check_fits(artifact.manifest)
            text = token_texts(artifact).text
    if arguments.json:
        write_json(as_dict(overlay, text))
    else:
        print(page(overlay, text))
    return 0


def token_texts(artifact: Artifact) -> TokenTexts:
    """Return what makes tokens of words, and words of tokens."""
    return TokenTexts(Tokenizer.from_artifact(artifact), artifact.manifest.model.vocab_size)


def as_dict(overlay: Overlay, text: Text | None) -> dict[str, Any]:
    """An overlay as a dict for JSON; without the numbers of its rows, of which it has the norms."""
    return {
        **_spec(overlay.spec),
        "entries": len(overlay),
        "rows": len(overlay.rows),
        "edits": [
            {
                "token": edit.token,
                "text": None if text is None else text(edit.token),
                "layer": edit.layer,
                "operation": edit.operation,
                "factor": edit.factor if edit.operation == "scale" else None,
                "norm": None if edit.row is None else float((edit.row**2).sum() ** 0.5),
            }
            for edit in overlay.edits()
        ],
    }


def page(overlay: Overlay, text: Text | None) -> str:
    """An overlay as people read it: tokens with equal operations in one line."""
    spec = overlay.spec
    tokens = np.unique(overlay.entries.tokens).astype(np.int64)
    rows = [
        ("overlay", spec.name),
        *([("about", spec.description)] if spec.description else []),
        ("model", spec.identity),
        ("shape", f"{spec.layers} memory rows of {spec.width} values"),
        ("stored", f"{_count(len(overlay.rows), 'row')} as {spec.codec}"),
        ("changes", f"{_count(len(overlay), 'row')} of {_count(len(tokens), 'token')}"),
    ]
    lines = [table(rows)]
    if tokens.size:
        lines += ["", table(_listed(overlay, tokens[:_MOST_TOKENS], text))]
    if len(tokens) > _MOST_TOKENS:
        lines.append(f"and {number(len(tokens) - _MOST_TOKENS)} tokens more; --json lists all.")
    return "\n".join(lines)


def _listed(
    overlay: Overlay, tokens: NDArray[np.int64], text: Text | None
) -> list[tuple[str, ...]]:
    def row(token: str, word: str, what: str) -> tuple[str, ...]:
        return (token, what) if text is None else (token, word, what)

    rows = [row("token", "text", "layers: operation")]
    for token, what in _by_token(overlay, tokens).items():
        rows.append(row(f"#{token}", "" if text is None else repr(text(token)), what))
    return rows


def _by_token(overlay: Overlay, tokens: NDArray[np.int64]) -> dict[int, str]:
    """What becomes of each of some tokens: ``0-2,5: replace; 3: scale 0.5``."""
    found: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for edit in overlay.edits(overlay.find(tokens)[0]):
        what = f"scale {edit.factor:g}" if edit.operation == "scale" else edit.operation
        found[edit.token][what].append(edit.layer)
    return {
        token: "; ".join(f"{_ranges(layers)}: {what}" for what, layers in each.items())
        for token, each in found.items()
    }


def _ranges(layers: Iterable[int]) -> str:
    """Ascending numbers, neighbours as ranges: ``0-2,5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)


def _written(written: Written) -> dict[str, Any]:
    counts = {"entries": written.entries, "rows": written.rows, "bytes": written.bytes}
    return {"path": str(written.path), **_spec(written.spec), **counts}


def _rows(written: Written) -> list[tuple[str, str]]:
    return [
        ("overlay", f"{written.path}, {byte_count(written.bytes)}"),
        ("name", written.spec.name),
        ("model", written.spec.identity[:19]),
        ("changes", _count(written.entries, "row")),
        ("stored", f"{_count(written.rows, 'row')} as {written.spec.codec}"),
    ]


def _count(found: int, what: str) -> str:
    return f"{number(found)} {what}{'' if found == 1 else 's'}"


def _spec(spec: OverlaySpec) -> dict[str, Any]:
    return asdict(spec)
