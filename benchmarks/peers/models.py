"""One random dense network in the form of every runtime: made once, kept, made again where missing.

    python -m benchmarks.peers.models DIR [--shape 1b|tiny] [--only NAME ...] [--again NAME ...]

The network is the `1b` preset at beta 8: the same number of parameters as its MemoryLLM. Whatever
is in DIR already stays as it is. The 1b shape takes 15 GB of disk and, in the model builder of
onnxruntime-genai, 15 GB of memory.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import forms

# Tiny: weights large enough for attention that is not uniform, so that a wrong rotation of keys
# shows; few layers, as 4 bits cost random weights much in each; and a feed-forward width (683)
# that needs padding, as that of 1b does.
SHAPES = {
    "1b": ["--preset", "1b"],
    "tiny": [
        *("--preset", "tiny", "--vocab-size", "2048", "--set", "model.tie_word_embeddings=false"),
        *("--set", "model.initializer_range=0.04", "--set", "model.num_hidden_layers=2"),
    ],
}

# What makes the peer faster or smaller without changing its result: logits of the last position
# only, gate and up as one matrix (as is usual for q, k and v), and the embedding in 4 bits.
_GENAI = ["prune_lm_head=true", "fuse_mlp_gate_up=true"]
_GENAI_INT4 = [*_GENAI, "accuracy_level=4", "op_types_to_quantize=MatMul/Gather"]


@dataclass(frozen=True)
class Target:
    """A file or folder, what it is made from, and how: ``make(folder, out, shape)``."""

    path: str
    needs: tuple[str, ...]
    make: Callable[[Path, Path, str], None]


def _checkpoint(folder: Path, out: Path, shape: str) -> None:
    dtype = "training.save_dtype=bfloat16"
    _edge("train", *SHAPES[shape], "--beta", "8", "--steps", "0", "--out", str(out), "--set", dtype)


def _edge_artifact(weights: str) -> Callable[[Path, Path, str], None]:
    def make(folder: Path, out: Path, shape: str) -> None:
        judged = "--accept-quality-loss" if shape == "tiny" else "--no-verify"
        _edge("export", str(folder / "checkpoint"), str(out), "--graph-weights", weights, judged)

    return make


def _genai(precision: str, *options: str) -> Callable[[Path, Path, str], None]:
    def make(folder: Path, out: Path, shape: str) -> None:
        cache = folder / "genai-cache"
        module = ["-m", "onnxruntime_genai.models.builder"]
        where = ["-i", str(folder / "llama"), "-o", str(out), "-c", str(cache)]
        what = ["-p", precision, "-e", "cpu", "--extra_options", *options]
        subprocess.run([sys.executable, *module, *where, *what], stdout=sys.stderr, check=True)
        shutil.rmtree(cache, ignore_errors=True)

    return make


def _llama(folder: Path, out: Path, shape: str) -> None:
    forms.write_llama(folder / "checkpoint", out)


def _gguf_f16(folder: Path, out: Path, shape: str) -> None:
    forms.write_gguf(folder / "llama", out)


def _gguf_q4(head: str) -> Callable[[Path, Path, str], None]:
    def make(folder: Path, out: Path, shape: str) -> None:
        forms.quantize_gguf(folder / "llama-f16.gguf", out, head)

    return make


TARGETS = {
    "checkpoint": Target("checkpoint", (), _checkpoint),
    "llama": Target("llama", ("checkpoint",), _llama),
    "edge": Target("edge-int4", ("checkpoint",), _edge_artifact("int4")),
    "edge-exact": Target("edge-fp32", ("checkpoint",), _edge_artifact("fp32")),
    "gguf-f16": Target("llama-f16.gguf", ("llama",), _gguf_f16),
    "gguf-q4_0": Target("llama-q4_0.gguf", ("gguf-f16",), _gguf_q4("Q4_0")),
    "gguf-q4_0-q6-head": Target("llama-q4_0-q6-head.gguf", ("gguf-f16",), _gguf_q4("Q6_K")),
    "genai-int4-32": Target(
        "genai-int4-32", ("llama",), _genai("int4", "block_size=32", *_GENAI_INT4)
    ),
    "genai-int4-128": Target(
        "genai-int4-128", ("llama",), _genai("int4", "block_size=128", *_GENAI_INT4)
    ),
    "genai-fp32": Target("genai-fp32", ("llama",), _genai("fp32", *_GENAI)),
}
_FOR_CHECKS = ("edge-exact", "genai-fp32")


def path_of(folder: Path, name: str) -> Path:
    """Where the target of this name lies."""
    return folder / TARGETS[name].path


def ensure(folder: Path, name: str, shape: str) -> Path:
    """Make a target, and what it needs, unless it is there. It appears complete or not at all."""
    target = TARGETS[name]
    path = folder / target.path
    if path.exists():
        return path
    for each in target.needs:
        ensure(folder, each, shape)
    print(f"making {path}", file=sys.stderr)
    partial = path.with_name(f"{path.name}.partial")
    remove(partial)
    target.make(folder, partial, shape)
    partial.rename(path)
    return path


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _edge(*words: str) -> None:
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    subprocess.run(command, stdout=sys.stderr, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the models are kept")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="default: 1b")
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="NAME", help="only these")
    parser.add_argument(
        "--again", nargs="+", choices=TARGETS, default=[], metavar="NAME", help="remove these first"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.again:
        remove(path_of(arguments.folder, name))
    wanted = arguments.only or [name for name in TARGETS if name not in _FOR_CHECKS]
    for name in wanted:
        print(ensure(arguments.folder, name, arguments.shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
