"""Graphs stepped by hand as a runtime would, and graphs changed as a hostile author could."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.layout import RecordBuffer, RecordLayout
from edge_memllm.artifact.manifest import FileSpec, Manifest
from edge_memllm.codecs import get_codec
from edge_memllm.errors import ArtifactError
from edge_memllm.modeling import TokenRows
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph.model import GRAPH_FILE, GraphForm, build_graph, save_graph

IDENTITY = "sha256:" + "0" * 64
CAPACITY = 40


class GraphSession:
    """A built graph and the records of its network, stepped by hand as a runtime would."""

    def __init__(self, checkpoint: Path, weights: str, codec: str, folder: Path) -> None:
        source = Checkpoint.open(checkpoint)
        reference = source.architecture.reference()
        self.config = reference.network.config
        memory = source.spec.memory
        self.network = reference.network
        embedding_dtype = "float32" if weights == "fp32" else "float16"
        self.dtype = np.dtype(embedding_dtype)
        self.layout = RecordLayout(
            memory.layers,
            memory.width,
            get_codec(codec),
            embedding_dtype,
            embedding_width=source.spec.hidden_size,
        )
        self.table = self._encode_table()
        form = GraphForm(weights, self.layout.codec, embedding_dtype)
        model = build_graph(source.spec, source.architecture.build, form, IDENTITY)
        save_graph(model, folder)
        self.session = onnxruntime.InferenceSession(
            folder / GRAPH_FILE, providers=["CPUExecutionProvider"]
        )
        self.gain = np.array(memory.gain, self.dtype)

    def empty_cache(self, batch: int = 1) -> dict[str, np.ndarray]:
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        return {
            name: np.zeros((batch, shape[1], CAPACITY, shape[3]), self.dtype)
            for name, shape in shapes.items()
            if name.startswith("past_key_values")
        }

    def step(
        self, ids: np.ndarray, lengths: list[int], cache: dict[str, np.ndarray], wanted: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`ids` [B, T], valid positions per sequence after the step, positions wanted [B, K]."""
        distinct, index = np.unique(ids, return_inverse=True)
        feeds = {
            "token_index": index.reshape(ids.shape),
            "logits_index": wanted,
            "seqlens_k": np.array(lengths, np.int32) - 1,
            "total_sequence_length": np.array(max(lengths), np.int32),
            **self.records(distinct),
            **cache,
        }
        names = [value.name for value in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, feeds), strict=True))
        logits = outputs.pop("logits")
        return logits, {n.replace("present", "past_key_values"): v for n, v in outputs.items()}

    def records(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's inputs for the records of `ids`."""
        buffer = RecordBuffer(self.layout, len(ids))
        for slot, token in enumerate(ids):
            parts = [part[token] for part in self.table if part[token].size]
            for target, part in zip(buffer.parts(slot), parts, strict=True):
                target[:] = part.data
        gain = {"memory_gain": self.gain} if self.layout.layers else {}
        return {"embedding": buffer.embedding(len(ids)), **buffer.wire(len(ids)), **gain}

    def logits(self, ids: list[int], chunk: int) -> np.ndarray:
        """Logits [T, V] of one sequence fed `chunk` tokens at a time."""
        cache = self.empty_cache()
        parts = []
        for start in range(0, len(ids), chunk):
            part = np.array([ids[start : start + chunk]])
            wanted = np.arange(part.shape[1])[None]
            logits, cache = self.step(part, [start + part.shape[1]], cache, wanted)
            parts.append(logits[0])
        return np.concatenate(parts)

    def judged_logits(self, ids: list[int]) -> np.ndarray:
        """What the network computes from the same records, decoded by the codec."""
        distinct, index = np.unique(ids, return_inverse=True)
        embedding, scales, codes = (part[distinct] for part in self.table)
        rows = self.layout.codec.decode(scales, codes, self.layout.layers, self.layout.width)
        fed = TokenRows(
            torch.from_numpy(index.reshape(1, -1)),
            torch.from_numpy(embedding.view(self.dtype).astype(np.float32)),
            torch.from_numpy(rows),
        )
        with torch.inference_mode():
            return self.network(token_rows=fed).logits[0].numpy()

    def _encode_table(self) -> list[np.ndarray]:
        """Embeddings, scales and codes of all tokens, as bytes."""
        ids = torch.arange(self.config.vocab_size)
        with torch.inference_mode():
            embedding = self.network.model.embed_tokens(ids).numpy().astype(self.dtype)
            rows = self.network.model.memory_rows(ids).numpy()
        return [embedding.view(np.uint8), *self.layout.codec.encode(rows)]


Change = Callable[[Any], object]


def seal(folder: Path, manifest: Manifest, *names: str, **parts: Any) -> None:
    """Write the manifest so that it vouches for the files as they are now."""
    files = dict(manifest.files)
    for name in (manifest.graph.file, *names):
        content = (folder / name).read_bytes()
        files[name] = FileSpec(len(content), hashlib.sha256(content).hexdigest())
    changed = dataclasses.replace(manifest, files=files, **parts)
    (folder / "manifest.json").write_bytes(changed.to_json())


def manifest_of(folder: Path) -> Manifest:
    with Artifact.open(folder) as artifact:
        return artifact.manifest


def change_graph(folder: Path, change: Change) -> None:
    import onnx

    manifest = manifest_of(folder)
    path = folder / manifest.graph.file
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    seal(folder, manifest)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        edge_memllm.load(folder, device="cpu", threads=1)
