"""How often a bounded record cache would have the record that real text asks for next.

    python benchmarks/hit_rate.py ARTIFACT --text valid.txt --hot-text train.txt [--json]

Feeds the text, cut into tokens by the artifact's tokenizer, to caches of several sizes: the one of
the program (CLOCK) and LRU, each with and without half of its slots given to the most frequent
tokens of the second text. Every cache is empty at the start. No record is read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_memllm.artifact import Artifact
from edge_memllm.record_cache import RecordCache
from edge_memllm.tokenization import Tokenizer

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_PIECE_CHARACTERS = 1 << 16


class LeastRecentlyUsed:
    """The textbook cache, to compare with; hot tokens stay, in half of the slots at most."""

    def __init__(self, slots: int, hot_tokens: Sequence[int]) -> None:
        self._hot = set(hot_tokens[: slots // 2])
        self._hot_here: set[int] = set()
        self._room = slots - len(self._hot)
        self._here: OrderedDict[int, None] = OrderedDict()

    def hits(self, token: int) -> bool:
        """Ask for a token; return whether it was there."""
        if token in self._hot:
            found = token in self._hot_here
            self._hot_here.add(token)
            return found
        found = token in self._here
        self._here[token] = None
        self._here.move_to_end(token)
        if len(self._here) > self._room:
            self._here.popitem(last=False)
        return found


class Clock:
    """The program's own cache, with records of one byte."""

    def __init__(self, slots: int, hot_tokens: Sequence[int]) -> None:
        self._cache = RecordCache(slots, 1, hot_tokens)
        self._record = [memoryview(bytearray(1))]

    def hits(self, token: int) -> bool:
        """Ask for a token; return whether it was there."""
        if self._cache.load(token, self._record):
            return True
        self._cache.store(token, self._record)
        return False


def pieces(path: Path) -> Iterator[str]:
    """The text in pieces that end at a line."""
    with path.open(encoding="utf-8") as lines:
        while piece := lines.readlines(_PIECE_CHARACTERS):
            yield "".join(piece)


def tokens_of(path: Path, tokenizer: Tokenizer) -> Iterator[int]:
    for piece in pieces(path):
        yield from tokenizer.encode(piece)


def measure(text: list[int], hot: list[int], vocabulary: int) -> list[dict[str, Any]]:
    rows = []
    for share in SHARES:
        slots = max(1, round(share * vocabulary))
        row: dict[str, Any] = {"share": share, "records": slots}
        for name, kind in (("clock", Clock), ("lru", LeastRecentlyUsed)):
            for suffix, pinned in (("", []), ("_hot", hot)):
                cache = kind(slots, pinned)
                row[name + suffix] = sum(map(cache.hits, text)) / len(text)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="whose tokens are asked for")
    parser.add_argument("--hot-text", type=Path, help="whose most frequent tokens are kept")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with Artifact.open(given.artifact) as artifact:
        tokenizer = Tokenizer.from_artifact(artifact)
        vocabulary = artifact.manifest.model.vocab_size
        record_bytes = artifact.manifest.table.record_bytes
    text = list(tokens_of(given.text, tokenizer))
    counts = Counter(tokens_of(given.hot_text, tokenizer)) if given.hot_text else Counter()
    hot = [token for token, _ in counts.most_common()]
    report = {
        "vocabulary": vocabulary,
        "record_bytes": record_bytes,
        "tokens": len(text),
        "distinct_tokens": len(set(text)),
        "rows": measure(text, hot, vocabulary),
    }
    print(json.dumps(report, indent=2) if given.json else table(report))
    return 0


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['tokens']:,} tokens, {report['distinct_tokens']:,} different ones",
        f"{'share':>6} {'records':>8} {'MB':>8} {'CLOCK':>7} {'+ hot':>7} {'LRU':>7} {'+ hot':>7}",
    ]
    for row in report["rows"]:
        size = row["records"] * report["record_bytes"] / 1e6
        rates = " ".join(f"{row[name]:7.3f}" for name in ("clock", "clock_hot", "lru", "lru_hot"))
        lines.append(f"{row['share']:6.1%} {row['records']:8,} {size:8.1f} {rates}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
