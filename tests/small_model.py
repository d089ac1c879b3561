"""A model over a real table and the fake runtime: everything but the graph."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from conftest import BOS, EOS, VOCABULARY, _byte_tokenizer
from small_artifact import SmallArtifact, write_artifact

from edge_memllm.artifact import Artifact
from edge_memllm.manifest import FileSpec
from edge_memllm.model import Model
from edge_memllm.table import Table
from edge_memllm.tokenization import Tokenizer
from edge_memllm_runtimes.fake import FakeCache, FakeRuntime

CONTEXT = 128


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(_byte_tokenizer().to_str().encode())


def write_small_artifact(path: Path, **files: bytes) -> SmallArtifact:
    """An artifact with the byte-level tokenizer; `name__json=b"..."` adds the file `name.json`."""
    made = write_artifact(path, vocab_size=VOCABULARY)
    model = dataclasses.replace(made.manifest.model, bos_token_id=BOS, eos_token_ids=(EOS,))
    contents = {"tokenizer.json": _byte_tokenizer().to_str().encode()}
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

    def __init__(self, script: Sequence[int], prompt_length: int = 1) -> None:
        super().__init__(VOCABULARY, CONTEXT)
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
        if place < len(self.script):
            wanted[..., self.script[place]] = 10
        return wanted
