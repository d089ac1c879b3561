"""Write tests/golden/vN, artifacts that every later version must read. Run once per format.

    cd tests && python -m support.golden golden/v2

An existing golden artifact is never written again: a change of format gets a new folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from edge_memllm import Model, Sampling, load
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.sections import MixedLayout
from edge_memllm.codecs.layered import Allocation
from edge_memllm.engine.feeding import Feeder
from edge_memllm.table.table import Table
from edge_memllm.table.writer import TableWriter
from edge_memllm_export import export_model
from support.checkpoints import write_checkpoint

TOKENS = 64
PROMPT = [7, 10, 11, 11, 14]
PLAIN = ("int8-g32", "nested8-g32")
MIXED = (("int8-g32", "int5-g32"), ("codebook4-g32", "int4-g32"), ("codebook2-g32", "int6-g32"))


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder}: exists. A new format gets a new folder.")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, exact = Path(scratch) / "checkpoint", Path(scratch) / "exact"
        write_small_checkpoint(checkpoint)
        for out, codec in [(exact, "f32"), *((folder / f"fp32-{each}", each) for each in PLAIN)]:
            export_model(
                checkpoint, out, graph_weights="fp32", table_codec=codec, accept_quality_loss=True
            )
        write_mixed(exact, folder / "fp32-int8-g32", folder / "fp32-mixed-g32")
    for path in sorted(folder.iterdir()):
        write_expectations(path)


def write_small_checkpoint(path: Path) -> None:
    """A checkpoint with so few tokens that its table is of 40 kB."""
    write_checkpoint(
        path,
        dtype="float32",
        seed=7,
        vocab_size=TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    characters = {chr(64 + token): token for token in range(TOKENS)}
    Tokenizer(models.BPE(vocab=characters, merges=[])).save(str(path / "tokenizer.json"))


def write_mixed(exact: Path, like: Path, out: Path) -> None:
    """Make an artifact with classes of tokens from one whose graph is fed alike, and exact rows."""
    shutil.copytree(like, out)
    class_of = np.arange(TOKENS) ** 2 % 7 % 3  # in no order
    allocation = Allocation(MIXED, class_of.astype(np.uint8))
    with Artifact.open(exact) as source, closing(Table.open(source)) as table:
        layout = MixedLayout.of(table.layout, allocation)
        order = layout.stored_order(TOKENS)
        embedding, rows = table.embeddings(order), table.rows(order)
    fit = layout.fit()
    fit.add(rows)
    layout = layout.with_parameters(fit.parameters())
    with Artifact.open(out) as opened:
        manifest = opened.manifest
    file = out / manifest.table.file
    file.unlink()
    with TableWriter(file, layout, TOKENS, manifest.model.identity) as writer:
        writer.append(embedding, rows)
        spec, table_file = writer.finish()
    files = manifest.files | {spec.file: table_file}
    (out / "manifest.json").write_bytes(replace(manifest, table=spec, files=files).to_json())


def logits_after(model: Model, prompt: list[int]) -> np.ndarray:
    """Logits [V] after the prompt."""
    with Feeder(model.runtime, model.table, 1, 16) as feeder:
        return np.array(feeder.prefill(0, prompt))


def continuation(model: Model, prompt: list[int]) -> list[int]:
    """Twelve greedy tokens after the prompt."""
    greedy = Sampling(temperature=0.0)
    pieces = model.stream(prompt, max_new_tokens=12, sampling=greedy, ignore_eos=True)
    return [piece.token for piece in pieces]


def write_expectations(path: Path) -> None:
    """What the model computes, beside its folder."""
    with load(path) as model:
        expected = {"prompt": PROMPT, "tokens": continuation(model, PROMPT)}
        logits = logits_after(model, PROMPT)
    path.with_name(f"{path.name}.json").write_text(json.dumps(expected, indent=1) + "\n")
    np.save(path.with_name(f"{path.name}.npy"), logits, allow_pickle=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
