"""Our artifacts and llama.cpp's files against the float weights, and their speeds, stored.

Two parts: the file as it is, and a rescaled copy in llama.cpp's types and in our forms of as many
bytes. What an earlier run has made is used as it is; the stored figures of a part are of one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import environment
from benchmarks.real import llama_types, speed
from benchmarks.real.check import command
from benchmarks.real.quality import Scores, artifact_scores, judged
from benchmarks.real.reference import WINDOW, Reference, windows
from benchmarks.real.rescaled import write_copy, write_folder

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "real-models.json"
SEED = 0
# Our forms of the copy, beside one of as many bytes as each of llama.cpp's types.
FORMS = {
    "int8": ("--graph-weights", "int8"),
    "default": (),
    "--bits 4.7": ("--bits", "4.7"),
}
_PACKAGES = (
    *(
        "edge-memllm",
        "onnxruntime",
        "llama-cpp-python",
        "xllamacpp",
        "gguf",
        "transformers",
        "torch",
    ),
)


@dataclass(frozen=True)
class Judge:
    """How models are judged: on a text they have nothing of, so many windows, so many threads."""

    text: Path
    windows: int
    threads: int

    def quality(
        self, source: Path, artifacts: Mapping[str, Path], files: Mapping[str, Path]
    ) -> dict[str, Any]:
        """Return the figures of artifacts and GGUF files against the float weights of a source."""
        import edge_memllm

        reference = Reference(source, self.threads)
        cut = windows(reference.tokens(self.text.read_text("utf-8")), self.windows)
        with ExitStack() as opened:
            contenders: dict[str, Scores] = {}
            for name, folder in artifacts.items():
                model = edge_memllm.load(folder, device="cpu", threads=self.threads)
                contenders[name] = artifact_scores(opened.enter_context(model))
            for name, file in files.items():
                contenders[name] = self._file_scores(file)
            found = judged(contenders, reference.log_probabilities, cut)
        first = next(iter(found.values()))
        sizes = {name: artifact_bytes(folder) for name, folder in artifacts.items()}
        sizes |= {name: {"file": llama_types.tensor_bytes(each)} for name, each in files.items()}
        return {
            "text": self.text.name,
            "tokens": first.tokens,
            "window": WINDOW,
            "perplexity": first.reference,
            "models": {
                name: {"bytes": sizes[name], "ours": name in artifacts, **each.as_dict()}
                for name, each in found.items()
            },
        }

    def _file_scores(self, file: Path) -> Scores:
        from benchmarks.peers.engines import LlamaCpp

        engine = LlamaCpp(file, self.threads, WINDOW + 1)

        def scores(window: Sequence[int]) -> NDArray[np.float32]:
            return engine.scores(window[:-1])

        return scores


def compare_file(
    gguf: Path, folder: Path, judge: Judge, rounds: int, artifact: Path | None
) -> Iterator[str]:
    """Compare on the file as it is, with an artifact made already or now; yield what is done."""
    if artifact is None:
        artifact = folder / "artifact"
        if not artifact.exists():
            yield "exporting the file"
            _exported(gguf, artifact, ())
    yield "judging"
    quality = judge.quality(gguf, {speed.OURS: artifact}, {"llama.cpp": gguf})
    asked = speed.Measuring(rounds, judge.threads, steps=32)
    found = []
    for each in speed.measure(artifact, gguf, asked):
        found.append(each)
        yield f"round {len(found)} of {rounds}"
    measured = {"rounds": rounds, "threads": judge.threads, "models": speed.summary(found)}
    store("file", {"name": gguf.name, "quality": quality, "speed": measured})


def compare_copy(gguf: Path, folder: Path, judge: Judge) -> Iterator[str]:
    """Compare on a rescaled copy of the file; yield what is done."""
    copy, source = folder / "copy-F16.gguf", folder / "copy"
    if not source.exists():
        yield "rescaling"
        write_copy(gguf, copy, SEED)
        write_folder(copy, source)
    files = {kind: llama_types.llama_file(copy, kind, folder) for kind in llama_types.TYPES}
    sizes = {kind: llama_types.tensor_bytes(file) for kind, file in files.items()}
    forms = {**FORMS, **{f"as {k}": ("--target-size", str(size)) for k, size in sizes.items()}}
    artifacts, refused = {}, []
    for name, options in forms.items():
        yield f"exporting: {name}"
        out = folder / f"ours-{name.replace(' ', '-').strip('-')}"
        if out.exists() or _exported(
            source, out, (*options, "--accept-quality-loss"), may_refuse=True
        ):
            artifacts[name] = out
        else:
            refused.append(name)
    yield "judging"
    found = judge.quality(source, artifacts, files)
    store("copy", {"name": gguf.name, "seed": SEED, "refused": refused, "quality": found})


def artifact_bytes(artifact: Path) -> dict[str, int]:
    """Bytes of an artifact's graph, its weights included, and of its table."""
    sizes = {each.name: each.stat().st_size for each in artifact.iterdir()}
    table = sum(size for name, size in sizes.items() if name.startswith("table"))
    graph = sum(size for name, size in sizes.items() if name.startswith("graph"))
    return {"graph": graph, "table": table}


def _exported(source: Path, out: Path, options: Sequence[str], may_refuse: bool = False) -> bool:
    done = command(["export", str(source), str(out), *options])
    if done.status and not may_refuse:
        raise RuntimeError(f"{source.name}: its export failed; it said why above.")
    return done.status == 0


def store(part: str, found: Mapping[str, Any]) -> None:
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    stored[part] = {**found, "environment": environment(_PACKAGES)}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
