"""Small random artifacts, written without an exporter, and models over them and the fake runtime.

The table is a real one; the graph is a few bytes that nobody reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.artifact.manifest import FileSpec, GraphSpec, Manifest
from edge_memllm.artifact.model_spec import CacheSpec, MemorySpec, ModelSpec
from edge_memllm.artifact.sections import MixedLayout
from edge_memllm.codecs import Codec, get_codec
from edge_memllm.model import Model
from edge_memllm.table.table import Table
from edge_memllm.table.writer import TableWriter
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_runtimes.fake import FakeCache, FakeRuntime
from support.checkpoints import BOS, EOS, VOCABULARY, raw_byte_tokenizer

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
    mixed: MixedLayout | None = None,
    vocab_size: int = 24,
    layers: int = 2,
    width: int = 64,
    embedding_dtype: str = "float16",
    embedding_codec: str | None = None,
    alignment: int = 512,
    identity: str = IDENTITY,
    seed: int = 0,
) -> SmallArtifact:
    """Write an artifact into the new folder `path`."""
    path.mkdir(parents=True)
    codec = get_codec(codec) if isinstance(codec, str) else codec
    beta = 8 if codec.id == "none" else 0
    shape = (0, 0) if beta == 8 else (layers, width)
    layout = mixed or RecordLayout(
        *shape, codec, embedding_dtype, alignment, width, embedding_codec=embedding_codec
    )
    random = np.random.default_rng(seed)
    embedding = random.standard_normal((vocab_size, width)).astype(np.float32)
    rows = random.standard_normal((vocab_size, *shape)).astype(np.float32)
    if layout.parameters_bytes:
        fit = layout.fit()
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
        graph=GraphSpec("graph.onnx", None, "fp32", "float32", "float32", layout.wire, 23),
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
    rows = 0 if beta == 8 else layers
    return ModelSpec(
        identity=identity,
        architecture="memoryllm",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_ids=(2, 3),
        memory=MemorySpec(rows, width, "added", (1.0,) * layers) if rows else MemorySpec(),
        caches=tuple(CacheSpec(layer, 2, width // 4) for layer in range(layers)),
        details={"beta": beta},
    )


def as_version_2(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest as version 2 says it."""
    model = dict(content["model"])
    del model["architecture"]
    memory, caches, details = (model.pop(key) for key in ("memory", "caches", "details"))
    model |= {
        "beta": details["beta"],
        "num_key_value_heads": caches[0]["kv_heads"],
        "head_dim": caches[0]["head_dim"],
        "memory_gain": memory["gain"] or [1.0] * model["num_hidden_layers"],
        "memory_layers": memory["layers"],
    }
    table = {key: value for key, value in content["table"].items() if key != "embedding_codec"}
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return {**rest, "format_version": 2, "model": model, "table": table}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


CONTEXT = 128


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(raw_byte_tokenizer().to_str().encode())


def write_small_artifact(path: Path, context: int = CONTEXT, **files: bytes) -> SmallArtifact:
    """An artifact with the byte-level tokenizer; `name__json=b"..."` adds the file `name.json`."""
    made = write_artifact(path, vocab_size=VOCABULARY)
    model = dataclasses.replace(
        made.manifest.model,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        max_position_embeddings=context,
    )
    contents = {"tokenizer.json": raw_byte_tokenizer().to_str().encode()}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    specs = dict(made.manifest.files)
    for name, content in contents.items():
        (path / name).write_bytes(content)
        specs[name] = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    made.rewrite_manifest(model=model, files=specs)
    return made


def open_small_model(path: Path, runtime: FakeRuntime | None = None) -> Model:
    fake = FakeRuntime(VOCABULARY, CONTEXT) if runtime is None else runtime
    with ExitStack() as opened:
        artifact = opened.enter_context(Artifact.open(path))
        table = Table.open(artifact, "pread")
        opened.callback(table.close)
        model = Model(artifact, table, fake, Tokenizer.from_artifact(artifact))
        opened.pop_all()
    return model


class ScriptedRuntime(FakeRuntime):
    """Wants the tokens of a script, one after the other, after a prompt of known length.

    Also keeps every cache it made, so that a test can see whether it was closed.
    """

    def __init__(
        self, script: Sequence[int], prompt_length: int = 1, context: int = CONTEXT
    ) -> None:
        super().__init__(VOCABULARY, context)
        self.script = script
        self.prompt_length = prompt_length
        self.caches: list[FakeCache] = []
        self.fed = 0

    def new_cache(self, batch: int) -> FakeCache:
        self.caches.append(super().new_cache(batch))
        return self.caches[-1]

    def step(
        self, buffer: Any, distinct: int, token_index: Any, cache: Any, *rest: Any, **more: Any
    ):
        logits = super().step(buffer, distinct, token_index, cache, *rest, **more)
        self.fed += token_index.size
        place = int(cache.lengths.max()) - self.prompt_length
        wanted = np.zeros_like(logits)
        if 0 <= place < len(self.script):
            wanted[..., self.script[place]] = 10
        return wanted
