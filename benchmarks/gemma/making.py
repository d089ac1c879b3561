"""What is measured, made where it is missing: the folder, the GGUF file, our artifacts of it.

Everything of a shape lies in one folder and appears complete or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gemma.shapes import SHAPES
from benchmarks.peers.models import remove
from benchmarks.real.comparison import artifact_bytes

SEED = 0
FOLDER, GGUF = "model", "q4_0.gguf"
CONTEXT = 4096
# Our forms: options of the export. Random weights have no texts to calibrate on or to be judged by.
_COMMON = (
    *("--table-codec", "int8", "--graph-method", "rtn", "--context", str(CONTEXT), "--no-verify"),
    *("--kv-dtype", "float32"),  # the fastest on a CPU
)
_TWO_BITS = (
    "gate_up_proj=int2,down_proj=int2,lm_head=int2"  # about where Google's mobile weights are
)
FORMS = {
    "int4": ("--graph-weights", "int4", *_COMMON),
    "int2": ("--graph-weights", "int4", "--matrix-weights", _TWO_BITS, *_COMMON),
}


@dataclass(frozen=True)
class Place:
    """Where the files of a shape lie."""

    folder: Path
    shape: str

    @property
    def checkpoint(self) -> Path:
        """The folder of transformers, in bfloat16."""
        return self._of(FOLDER)

    @property
    def gguf(self) -> Path:
        """The file for llama.cpp."""
        return self._of(GGUF)

    def artifact(self, form: str) -> Path:
        """Our artifact in one of `FORMS`."""
        return self._of(form)

    def packed(self, form: str) -> Path:
        """Where a runtime keeps the weights of an artifact as its processor wants them."""
        return self._of(f"{form}-packed")

    def check(self) -> None:
        """Raise `FileNotFoundError` where something to be measured is missing."""
        for path, command in ((self.gguf, "make"), (self.artifact("int4"), "export")):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path}: missing; python -m benchmarks.gemma {command} makes it."
                )

    def sizes(self) -> dict[str, dict[str, int]]:
        """Bytes of what is measured: of the artifacts, by part, and of the GGUF file."""
        found = {
            form: artifact_bytes(self.artifact(form))
            for form in FORMS
            if self.artifact(form).exists()
        }
        return {**found, GGUF: {"file": self.gguf.stat().st_size}}

    def _of(self, name: str) -> Path:
        return self.folder / self.shape / name


def make_sources(place: Place, tokenizer: Path | None) -> None:
    """Write the folder and the GGUF file of a shape, unless they are there."""
    from benchmarks.gemma.folder import write_folder
    from benchmarks.gemma.gguf_file import write_gguf

    shape = SHAPES[place.shape]
    place.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for out, write in (
        (place.checkpoint, lambda part: write_folder(shape, SEED, part, tokenizer)),
        (place.gguf, lambda part: write_gguf(shape, SEED, part)),
    ):
        if not out.exists():
            part = out.with_name(f"{out.name}.partial")
            remove(part)
            write(part)
            part.rename(out)


def export(place: Place, form: str, options: Sequence[str]) -> dict[str, Any]:
    """Export the folder in a form, again if it was, and return what that took."""
    from benchmarks.export_memory import measured_export

    words = (*FORMS[form], *options)
    found = measured_export(place.checkpoint, place.artifact(form), (*words, "--overwrite"))
    if found["exit_code"]:
        raise RuntimeError(f"{place.checkpoint}: its export failed; it said why above.")
    return {**found, "options": " ".join(words)}
