"""What `--speculate` brings where a text repeats itself: an edit of code, asked of a server.

    python -m benchmarks.over_http.drafts URL [--speculate 8] [--rounds 5] [--file FILE]

Each function of a file is to be written again with another name. With and without drafts take
turns, at temperature 0, alone and two at once; replies are compared character by character.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_TOKENS = 160
_LEAST_LINES, _MOST_LINES = 8, 20


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", type=Path, default=ROOT / "edge_memllm/engine/slots.py")
    asked = parser.parse_args(words)
    edits = [*_edits(asked.file)][: asked.rounds]
    alone = [_pair(asked.url, each, asked.speculate, number) for number, each in enumerate(edits)]
    with ThreadPoolExecutor(2) as threads:
        both = threads.map(lambda each: _ask(asked.url, each, asked.speculate), edits[:2])
        shared = [each["choices"][0] for each in both]
    ratios = [
        plain["timings"]["predicted_ms"] / drafted["timings"]["predicted_ms"]
        for plain, drafted in alone
    ]
    told = [drafted["timings"] for _, drafted in alone]
    found = {
        "edits": len(alone),
        "equal": sum(_text(plain) == _text(drafted) for plain, drafted in alone),
        "times as fast": [round(each, 2) for each in sorted(ratios)],
        "median": round(statistics.median(ratios), 2),
        "drafts": sum(each.get("draft_n", 0) for each in told),
        "accepted": sum(each.get("draft_n_accepted", 0) for each in told),
        "tokens": sum(each["predicted_n"] for each in told),
        "two at once, equal": sum(
            each["message"]["content"] == _text(plain)
            for each, (plain, _) in zip(shared, alone, strict=False)
        ),
        "shared steps": [each["statistics"]["shared_steps"] for each in shared],
    }
    json.dump(found, sys.stdout, indent=1)
    print()
    return 0


def _edits(path: Path) -> Iterator[str]:
    """Yield a request for each function of a file."""
    source = path.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        text = ast.get_source_segment(source, node) if isinstance(node, ast.FunctionDef) else None
        if text and _LEAST_LINES <= text.count("\n") < _MOST_LINES:
            yield f"Write this function again, and call it renamed:\n\n```python\n{text}\n```"


def _pair(url: str, prompt: str, drafts: int, number: int) -> tuple[Any, Any]:
    """Return the replies without and with drafts; which of them comes first takes turns."""
    order = (0, drafts) if number % 2 else (drafts, 0)
    found = {each: _ask(url, prompt, each) for each in order}
    return found[0], found[drafts]


def _ask(url: str, prompt: str, drafts: int) -> Any:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _TOKENS,
        "temperature": 0,
        "speculate": drafts,
        "statistics": True,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def _text(reply: Any) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


if __name__ == "__main__":
    sys.exit(main())
