"""How many files somebody reads who follows one thing through the program.

A step that wanders through many files is hard to follow and hard to change. Each walk is traced as
it happens; when one takes more files than it may, the test says which they are.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import edge_memllm
from edge_memllm import Model
from support import ROOT
from support.checkpoints import MakeArtifact
from support.server import serving

PACKAGES = tuple(
    str(folder) + "/"
    for folder in (
        ROOT / "edge_memllm",
        ROOT / "runtimes" / "edge_memllm_runtimes",
        ROOT / "export" / "edge_memllm_export",
    )
)


class Walk:
    """The files of ours whose functions were called, in every thread begun since it was made."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}  # with the functions of each, as they came
        self.on = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if self.on and event == "call" and code.co_filename.startswith(PACKAGES):
            functions = self.files.setdefault(str(Path(code.co_filename).relative_to(ROOT)), [])
            if code.co_qualname not in functions:
                functions.append(code.co_qualname)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow what happens inside."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def check(self, most: int) -> None:
        """Fail where there are more files than there may be."""
        told = "\n".join(f"{file}: {', '.join(names)}" for file, names in self.files.items())
        assert len(self.files) <= most, f"{len(self.files)} files, expected at most {most}:\n{told}"


@pytest.fixture
def walk() -> Iterator[Walk]:
    made = Walk()
    own, others = sys.getprofile(), threading.getprofile()
    sys.setprofile(made)
    threading.setprofile(made)
    yield made
    sys.setprofile(own)
    threading.setprofile(others)


@pytest.fixture(scope="module")
def artifact(make_artifact: MakeArtifact) -> Path:
    return make_artifact(table_codec="int4-g32")


def opened(artifact: Path) -> Model:
    return edge_memllm.load(artifact, device="cpu", reader="pread", threads=1)


def test_loading_a_model(artifact: Path, walk: Walk) -> None:
    opened(artifact).close()  # what is done once in a process
    with walk.followed():
        model = opened(artifact)
    model.close()
    walk.check(49)  # most check one file of the artifact each; two the graph, six rewrite it


def test_the_next_token_of_a_text(artifact: Path, walk: Walk) -> None:
    with opened(artifact) as model:
        stream = model.stream("Once upon a time", ignore_eos=True)
        for _ in range(3):
            next(stream)
        with walk.followed():
            next(stream)
        stream.close()
    walk.check(13)  # one of them is whichever tokenizer reads the vocabulary


def test_a_text_of_one_token(artifact: Path, walk: Walk) -> None:
    with opened(artifact) as model:
        model.generate("Once upon a time", max_new_tokens=1)
        with walk.followed():
            model.generate("Once upon a time", max_new_tokens=1)
    walk.check(25)


def test_a_token_of_a_list_of_texts(artifact: Path, walk: Walk) -> None:
    with opened(artifact) as model, walk.followed():
        model.generate(["Once upon a time", "there was"], max_new_tokens=2)
    walk.check(30)


def test_a_streamed_token_of_the_server(artifact: Path, walk: Walk) -> None:
    asked = {"prompt": "Once", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with opened(artifact) as model, serving(model) as served:
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request(
            "POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        events = (line for line in response if line.startswith(b"data: "))
        for _ in range(4):
            next(events)
        with walk.followed():
            for _ in range(20):
                next(events)
        connection.close()
    walk.check(25)
