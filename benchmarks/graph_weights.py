r"""What each form of the graph's matrices costs: size, export, KL divergence and perplexity.

Every artifact has an f16 table, so the graph is the only difference to the checkpoint. Lines are
appended to OUT as they come and are not measured twice.

    python benchmarks/graph_weights.py examples/tiny-english weights.jsonl \
        --text wiki.txt novels.txt --blocks 32 128 --methods rtn gptq
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judged_artifact import JudgedArtifact
from edge_memllm_export.quality import measure_quality, text_tokens


def main() -> None:
    options = parse()
    calibration = options.calibration_text and options.calibration_text.read_text("utf-8")
    done = read(options.out)
    for form in forms(options):
        if any(form.items() <= line.items() for line in done):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            found = form | measure(options, form, Path(scratch, "artifact"), calibration)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    page(read(options.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--weights", nargs="+", default=["int4", "int8"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--heads", nargs="+", default=["int4", "int8"])
    return parser.parse_args()


def forms(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every combination once; an int4 head under int8 matrices is left out."""
    text = options.calibration_text.name if options.calibration_text else None
    names = itertools.product(options.weights, options.methods, options.blocks, options.heads)
    for weights, method, block, head in names:
        if (weights, head) != ("int8", "int4"):
            calibrated = text if method == "gptq" else None
            yield {
                "weights": weights,
                "method": method,
                "block": block,
                "head": head,
                "calibration": calibrated,
            }


def measure(
    options: argparse.Namespace, form: dict[str, Any], path: Path, calibration: str | None
) -> dict[str, Any]:
    start = process_time()
    report = export_model(
        options.checkpoint,
        path,
        graph_weights=form["weights"],
        graph_method=form["method"],
        graph_block=form["block"],
        matrix_weights={"lm_head": form["head"]},
        calibration_text=calibration if form["method"] == "gptq" else None,
        table_codec="f16",
        verify=False,
    )
    found: dict[str, Any] = {
        "graph_bytes": sum(
            file.bytes for name, file in report.manifest.files.items() if name.startswith("graph")
        ),
        "export_cpu_seconds": round(process_time() - start, 1),
    }
    with JudgedArtifact(path, Checkpoint.open(options.checkpoint).network()) as judged:
        for text in options.text:
            # The start of a text in another is not to be read to the end.
            ids = text_tokens(judged, text.read_text("utf-8")[: options.tokens * 8], options.tokens)
            quality = measure_quality(judged, ids)
            found[f"{text}"] = [quality.mean_kl, quality.perplexity_increase]
    return found


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def page(lines: list[dict[str, Any]]) -> None:
    texts = [name for name, value in lines[0].items() if isinstance(value, list)]
    print("\n| Matrices | Head | Method | Block | Graph, MB |", " | ".join(texts), "|")
    print("| --- | --- | --- | --- | --- |", " | ".join("---" for _ in texts), "|")
    for line in lines:
        figures = [f"{line[t][0]:.5f}, {line[t][1]:+.2%}" for t in texts if t in line]
        words = [line["weights"], line["head"], line["method"], str(line["block"])]
        print("|", " | ".join([*words, f"{line['graph_bytes'] / 1e6:.2f}", *figures]), "|")


if __name__ == "__main__":
    main()
