"""What a tokenizer costs, read by its vocabulary file and by the `tokenizers` library, in turns.

    python benchmarks/tokenizer_memory.py ARTIFACT TEXT [--rounds 3] [--characters 2000000]

Each reader opens the artifact's tokenizer in a process of its own, encodes the text in parts of
4,000 characters, as prompts come, and decodes ids one by one. Exit code 1 if ids or texts differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from edge_memllm.artifact.folder import Artifact
from edge_memllm.statistics import give_back, process_memory
from edge_memllm.text.tokenization import Detokenizer, Tokenizer

_READERS = ("vocabulary file", "tokenizers")
_PART = 4000
_DECODED = 20_000  # ids


def main() -> int:
    """Print a table and the ratio of both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--characters", type=int, default=2_000_000)
    parser.add_argument("--reader", choices=_READERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.reader is not None:
        print(json.dumps(measured(asked.artifact, asked.text, asked.characters, asked.reader)))
        return 0
    found: dict[str, list[dict[str, Any]]] = {reader: [] for reader in _READERS}
    for _ in range(asked.rounds):
        for reader in _READERS:
            command = [sys.executable, *sys.argv, "--reader", reader]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found[reader].append(json.loads(done.stdout))
    ours, theirs = found.values()
    print(f"{'':34}{_READERS[0]:>16}{_READERS[1]:>12}{'ratio':>8}")
    for name in ours[0]:
        if isinstance(ours[0][name], str):
            continue
        one, other = (median(each[name] for each in side) for side in (ours, theirs))
        print(f"{name:34}{one:16.3f}{other:12.3f}{one / other:8.2f}")
    digests = {each["ids and texts"] for side in found.values() for each in side}
    print(f"ids and texts are {'equal' if len(digests) == 1 else 'DIFFERENT'}")
    return len(digests) - 1


def measured(folder: Path, text: Path, characters: int, reader: str) -> dict[str, Any]:
    """Open and use one reader; megabytes and seconds, and a digest of what came of it."""
    parts = _parts(text, characters)
    with Artifact.open(folder, check_graph=False) as artifact:
        before, start = process_memory(), perf_counter()
        tokenizer = (
            Tokenizer.from_artifact(artifact)
            if reader == _READERS[0]
            else Tokenizer.from_files(partial(_read, artifact), str(folder))
        )
        opened, peak = perf_counter() - start, process_memory().peak_bytes or 0
        if tokenizer.reader != reader:
            sys.exit(f"{folder}: has no vocabulary file")
        give_back()
        after = process_memory()
        start, ids = perf_counter(), [tokenizer.encode(part) for part in parts]
        encoded = perf_counter() - start
        whole = list(chain.from_iterable(ids))[:_DECODED]
        detokenizer, start = Detokenizer(tokenizer), perf_counter()
        pieces = [detokenizer.push(token) for token in whole]
        decoded = perf_counter() - start
    own, most = before.anon_bytes or 0, before.peak_bytes or 0
    shown = json.dumps([ids, pieces]).encode()
    return {
        "opened, s": opened,
        "memory of its own, MB": ((after.anon_bytes or 0) - own) / 1e6,
        "most while opening, MB": (peak - most) / 1e6,
        "encoded, thousand tokens/s": sum(map(len, ids)) / encoded / 1e3,
        "decoded singly, thousand tokens/s": len(whole) / decoded / 1e3,
        "ids and texts": hashlib.sha256(shown).hexdigest(),
    }


def _read(artifact: Artifact, name: str) -> bytes | None:
    return artifact.read_bytes(name) if name in artifact.manifest.files else None


def _parts(text: Path, characters: int) -> list[str]:
    with text.open(encoding="utf-8", errors="replace") as file:
        whole = file.read(characters)
    return [whole[start : start + _PART] for start in range(0, len(whole), _PART)]


if __name__ == "__main__":
    sys.exit(main())
