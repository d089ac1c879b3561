r"""What each table codec costs: size, error and perplexity of one checkpoint, table alone judged.

Every artifact has an fp32 graph, so the codec is the only difference; the first one, f32, is what
the others are compared with. Lines are appended to OUT as they come and are not measured twice.

    python benchmarks/codecs.py examples/tiny-english codecs.jsonl --text valid.txt \
        --codecs f32 int8 int4 int4+search codebook3
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import process_time

import numpy as np

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.evaluation.perplexity import measure_perplexity
from edge_memllm.table.table import Table
from edge_memllm_export import export_model

SEARCH = "+search"
WEIGHTED = "+text"
COARSE = "+coarse"  # only the front part of each record is read


def main() -> None:
    options = parse()
    texts = [path.read_text("utf-8")[: options.characters] for path in options.text]
    done = read(options.out)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        exact = None
        for name in options.codecs:
            if name in done and name != options.codecs[0]:
                continue
            path = Path(scratch, name)
            start = process_time()
            export(options, name, path)
            seconds = process_time() - start
            quality = "coarse" if name.endswith(COARSE) else "full"
            rows, sizes = stored(path, quality)
            exact = rows if exact is None else exact
            if name in done:
                continue
            found = {
                "codec": name,
                **sizes,
                "relative_rms_error": relative_error(rows, exact),
                "export_cpu_seconds": round(seconds, 1),
                "perplexity": [perplexity(path, quality, text, options.threads) for text in texts],
            }
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    page(read(options.out), options.codecs[0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="JSON lines")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--characters", type=int, help="of each text, from its start")
    parser.add_argument(
        "--codecs", nargs="+", required=True, metavar="CODEC[+search|+text|+coarse]"
    )
    parser.add_argument("--table-text", type=Path, help="for codecs with +text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where artifacts lie meanwhile")
    return parser.parse_args()


def export(options: argparse.Namespace, name: str, path: Path) -> None:
    counted = options.table_text.read_text("utf-8") if name.endswith(WEIGHTED) else None
    export_model(
        options.checkpoint,
        path,
        graph_weights="fp32",
        table_codec=name.partition("+")[0],
        table_search=name.endswith(SEARCH),
        table_text=counted,
        verify=False,
    )


def stored(path: Path, quality: str) -> tuple[np.ndarray, dict[str, float]]:
    """Decoded rows [V, L, D], and what they take."""
    with Artifact.open(path) as artifact:
        manifest, table = artifact.manifest, Table.open(artifact, "pread", quality=quality)
        rows = table.rows(np.arange(manifest.model.vocab_size))
        layout = table.layout
        table.close()
    bits = 8 * (layout.scales_bytes + layout.codes_bytes) / (layout.layers * layout.width)
    sizes = {
        "id": layout.codec.id,
        "record_bytes": layout.record_bytes,
        "bits_per_value": round(bits, 3),
        "parameters_bytes": layout.parameters_bytes,
    }
    return rows, sizes


def relative_error(rows: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.square(rows - exact).mean() / np.square(exact).mean()))


def perplexity(path: Path, quality: str, text: str, threads: int) -> float:
    """Of windows of the whole context, side by side."""
    with edge_memllm.load(path, device="cpu", threads=threads, table_quality=quality) as model:
        context = model.manifest.model.max_position_embeddings
        return measure_perplexity(model, text, context=context, stride=context).perplexity


def read(path: Path) -> dict[str, dict]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {found["codec"]: found for found in map(json.loads, lines)}


def page(found: dict[str, dict], reference: str) -> None:
    print("| Codec | Bits per value | Bytes per record | RMS error | Perplexity |")
    print("| --- | --- | --- | --- | --- |")
    base = found[reference]["perplexity"]
    for name, each in found.items():
        changes = zip(each["perplexity"], base, strict=True)
        cost = ", ".join(f"{value / first - 1:+.2%}" for value, first in changes)
        print(
            f"| {name} | {each['bits_per_value']:.2f} | {each['record_bytes']:,} "
            f"| {each['relative_rms_error']:.2%} | {cost} |"
        )


if __name__ == "__main__":
    main()
