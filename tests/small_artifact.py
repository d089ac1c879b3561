"""Small random artifacts, written without an exporter: a real table, a graph of a few bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_memllm.codecs import Codec, get_codec
from edge_memllm.manifest import FileSpec, GraphSpec, Manifest, ModelSpec
from edge_memllm.records import RecordLayout
from edge_memllm.table_writer import TableWriter

IDENTITY = "sha256:" + hashlib.sha256(b"a checkpoint").hexdigest()
OTHER_IDENTITY = "sha256:" + hashlib.sha256(b"another checkpoint").hexdigest()
OTHER_FILES = {"graph.onnx": b"not a graph, but nobody looks", "tokenizer.json": b"{}\n"}


@dataclass(frozen=True)
class SmallArtifact:
    path: Path
    manifest: Manifest
    embedding: np.ndarray  # [V, D]
    rows: np.ndarray  # [V, L, D]

    @property
    def table(self) -> Path:
        return self.path / self.manifest.table.file

    def rewrite_manifest(self, **changes: Any) -> None:
        """Write the manifest again with some of its parts replaced."""
        manifest = dataclasses.replace(self.manifest, **changes)
        (self.path / "manifest.json").write_bytes(manifest.to_json())


def write_artifact(
    path: Path,
    *,
    codec: str | Codec = "int8-g32",
    vocab_size: int = 24,
    layers: int = 2,
    width: int = 64,
    embedding_dtype: str = "float16",
    alignment: int = 512,
    identity: str = IDENTITY,
    seed: int = 0,
) -> SmallArtifact:
    """Write an artifact into the new folder `path`."""
    path.mkdir(parents=True)
    codec = get_codec(codec) if isinstance(codec, str) else codec
    beta = 8 if codec.id == "none" else 0
    layout = RecordLayout(0 if beta == 8 else layers, width, codec, embedding_dtype, alignment)
    random = np.random.default_rng(seed)
    embedding = random.standard_normal((vocab_size, width)).astype(np.float32)
    rows = random.standard_normal((vocab_size, layout.layers, width)).astype(np.float32)
    if layout.parameters_bytes:
        fit = layout.codec.fit(layout.layers, width)
        fit.add(rows[layout.stored_order(vocab_size)])
        layout = layout.with_parameters(fit.parameters())
    order = layout.stored_order(vocab_size)
    with TableWriter(path / "table.safetensors", layout, vocab_size, identity) as writer:
        writer.append(embedding[order], rows[order])
        table, table_file = writer.finish()
    for name, content in OTHER_FILES.items():
        (path / name).write_bytes(content)
    manifest = Manifest(
        model=model_spec(identity, beta, layers, width, vocab_size),
        table=table,
        graph=GraphSpec("graph.onnx", None, "fp32", "float32", "float32", layout.codec.wire, 23),
        files={
            table.file: table_file,
            **{name: file_spec(content) for name, content in OTHER_FILES.items()},
        },
        producer="edge-memllm 0.1.0",
    )
    (path / "manifest.json").write_bytes(manifest.to_json())
    return SmallArtifact(path, manifest, embedding, rows)


def file_spec(content: bytes) -> FileSpec:
    return FileSpec(len(content), hashlib.sha256(content).hexdigest())


def model_spec(identity: str, beta: int, layers: int, width: int, vocab_size: int) -> ModelSpec:
    return ModelSpec(
        identity=identity,
        beta=beta,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        vocab_size=vocab_size,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_ids=(2, 3),
        memory_gain=(1.0,) * layers,
        memory_layers=0 if beta == 8 else layers,
    )


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
