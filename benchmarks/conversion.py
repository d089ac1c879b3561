"""How much of a dense model's quality a converted student has, by the text it has learned from.

    python -m benchmarks.conversion measure --valid valid.txt --dense base --student
        flex-3=fitted-3,student-3 --scratch flex-3=runs/flex-3
    python -m benchmarks.conversion page

``measure`` evaluates the dense model, every checkpoint of the students (a folder of
``edge-memllm convert --steps 0`` and one of a training that kept its checkpoints) and networks of
the same shape trained from scratch, all on the same windows of held-out text, and writes
docs/results/conversion.json. ``page`` makes docs/results/conversion.md and its picture of that file
alone; with ``--check`` it only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conversion_page import page, plot
from benchmarks.dense.page_parts import CONTROL, FIRST, stored

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "conversion.json"
PAGE = RESULTS.with_suffix(".md")
PICTURE = ROOT / "docs" / "images" / "conversion.svg"
LENGTH = 256
_BATCH = 8
_DATA = ("document_start", "sequence_length", "boundary_first")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure")
    measure.add_argument("--valid", nargs="+", required=True, help="held-out texts")
    measure.add_argument("--document-start", help="as in the recipe of the dense model")
    measure.add_argument("--dense", type=Path, required=True)
    measure.add_argument("--student", action="append", default=[], metavar="NAME=FITTED[,TRAINED]")
    measure.add_argument("--scratch", action="append", default=[], metavar="NAME=DIR")
    measure.add_argument("--windows", type=int, default=64, help=f"of {LENGTH} tokens")
    commands.add_parser("page").add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.command == "measure":
        RESULTS.write_text(json.dumps(measured(arguments), indent=1) + "\n", encoding="utf-8")
        return 0
    return write_page(arguments.check)


def write_page(check: bool) -> int:
    results = json.loads(RESULTS.read_text("utf-8"))
    made = {PAGE: page(results, stored(FIRST), stored(CONTROL)), PICTURE: plot(results)}
    if not check:
        for path, content in made.items():
            path.write_text(content, encoding="utf-8")
        return 0
    old = [path.name for path, text in made.items() if path.read_text("utf-8") != text]
    if old:
        print(f"not made of {RESULTS.name}: {', '.join(old)}", file=sys.stderr)
    return 1 if old else 0


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the page says."""
    windows = held_out(arguments)
    return {
        "windows": len(windows),
        "length": LENGTH,
        "dense": finished(arguments.dense, windows),
        "students": [student(each, windows) for each in arguments.student],
        "scratch": [
            {"name": name, **finished(Path(folder), windows), **history(Path(folder))}
            for name, folder in (each.split("=") for each in arguments.scratch)
        ],
    }


def held_out(arguments: argparse.Namespace) -> Any:
    """Windows [W, T] spread evenly over the texts, in the dense model's tokens."""
    import torch

    from edge_memllm.artifact.atomic import WholeFile
    from edge_memllm.modeling.data import TokenWindows, documents, read_tokenizer, write_tokens
    from edge_memllm.modeling.recipe import DataRecipe

    config = json.loads((arguments.dense / "config.json").read_text("utf-8"))
    tokenizer = read_tokenizer(arguments.dense / "tokenizer.json")
    data = DataRecipe(document_start=arguments.document_start)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid.npy"
        texts = documents(arguments.valid, data)
        with WholeFile(path) as file:
            write_tokens(texts, tokenizer, config["bos_token_id"], file)
            file.publish()
        windows = TokenWindows(path, LENGTH)
        places = torch.linspace(0, len(windows) - 1, arguments.windows).long().tolist()
        return torch.stack([windows[place]["input_ids"] for place in places])


def loss(checkpoint: Path, windows: Any) -> float:
    """Mean next-token loss of a checkpoint, nats."""
    import torch

    from edge_memllm.modeling import MemoryLLMForCausalLM
    from edge_memllm.modeling.trainer import next_token_loss

    model = MemoryLLMForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        parts = [
            float(next_token_loss(model(part, use_cache=False).logits, part)) * len(part)
            for part in windows.split(_BATCH)
        ]
    return sum(parts) / len(windows)


def finished(folder: Path, windows: Any) -> dict[str, Any]:
    record = json.loads((folder / "training.json").read_text("utf-8"))
    kept = ("parameters", "tokens_seen")
    return {"loss": loss(folder, windows)} | {key: record.get(key, 0) for key in kept}


def history(folder: Path) -> dict[str, Any]:
    """The losses while training: no window was seen twice, so they are close to held-out ones."""
    record = json.loads((folder / "training.json").read_text("utf-8"))
    points = [[e["tokens"], e["loss"]] for e in record["history"] if "loss" in e]
    return {"history": points}


def student(given: str, windows: Any) -> dict[str, Any]:
    """Losses of a student: fitted, and at every checkpoint of its training."""
    name, _, folders = given.partition("=")
    fitted, *trained = (Path(folder) for folder in folders.split(","))
    record = json.loads(((trained or [fitted])[0] / "training.json").read_text("utf-8"))
    recipe = record["recipe"]
    points = [[0, loss(fitted, windows)]]
    for folder in trained:
        per_step = record["tokens_seen"] // recipe["training"]["steps"]
        points += [[step * per_step, loss(path, windows)] for step, path in checkpoints(folder)]
    return {
        "name": name,
        "parameters": record["parameters"],
        "fit_tokens": recipe["conversion"]["fit_tokens"],
        "settings": {
            **{key: recipe[key] for key in ("model", "training", "conversion")},
            "data": {key: recipe["data"][key] for key in _DATA},
        },
        "points": points,
    }


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of each checkpoint, in order."""
    found = (
        (int(path.name.split("-")[1]), path) for path in folder.glob("checkpoints/checkpoint-*")
    )
    yield from sorted(found)


if __name__ == "__main__":
    sys.exit(main())
