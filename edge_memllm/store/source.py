"""What somebody names as a model: an artifact, or a source that one can be exported of.

Decided by looking, at names and not at what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

from edge_memllm.artifact.manifest import MANIFEST_NAME
from edge_memllm.errors import ArtifactError
from edge_memllm.hub import HubModel, checkpoint_folder
from edge_memllm.hub.download import CHECKPOINT_FILES, download_file, published_files

CHECKPOINT, GGUF = "a checkpoint", "a GGUF file"

_CONFIG = "config.json"
_GGUF_END = ".gguf"
_WEIGHTS_END = ".safetensors"
_HEAD_BYTES = 1 << 20  # holds the header of a checkpoint's file, and the figures of a GGUF file
_GGUF_NUMBER = 5 / 8  # bytes of a weight, in the most common type
_SHOWN = 8  # names in a message

_VARIANT = re.compile(r"(.+):([A-Za-z0-9_.-]+)")
# A projector belongs to a model and is none; parts of one file are no files.
_NO_MODEL = re.compile(r"(^|/)mmproj|-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a source before it is read."""

    kind: str  # `CHECKPOINT` or `GGUF`
    bytes: int  # of its weights
    download: int = 0  # bytes that have to come first
    computed: int = 0  # values of the table that are not among the weights
    number_bytes: float = 2  # of one weight


class Source(Protocol):
    """Something that an artifact can be exported of."""

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def location(self) -> str:
        """Where it is, in the one way of saying it."""

    def fingerprint(self) -> str:
        """Return what changes when the source does. Raises `OSError`."""

    def facts(self) -> Facts:
        """Return what it is and how much. Raises `ArtifactError` for what is no source."""

    def fetch(self) -> Path:
        """Return the folder or file to export, downloaded first if need be."""


@dataclass(frozen=True, slots=True)
class LocalSource:
    """The folder of a checkpoint, or a GGUF file, of this machine. `path` is absolute."""

    path: Path
    kind: str

    @property
    def name(self) -> str:
        """The folder's, or the file's without its end."""
        return self.path.stem if self.kind == GGUF else self.path.name

    @property
    def location(self) -> str:
        """The path."""
        return str(self.path)

    def fingerprint(self) -> str:
        """Names, sizes and times of the files, and a digest of how each of them begins.

        Never reads gigabytes: it is asked for at every start.
        """
        digest = hashlib.sha256()
        for file in self._files():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_HEAD_BYTES))
        return f"sha256:{digest.hexdigest()}"

    def facts(self) -> Facts:
        """The weights, by their files, and what the configuration says of the table."""
        ends = (_WEIGHTS_END, _GGUF_END)
        stored = sum(file.stat().st_size for file in self._files() if file.suffix.lower() in ends)
        if self.kind == GGUF:
            return Facts(GGUF, stored, number_bytes=_GGUF_NUMBER)
        config = _config(self.path / _CONFIG)
        wide = "float32" in (config.get("dtype"), config.get("torch_dtype"))
        computed = _table_values(config)
        return Facts(CHECKPOINT, stored, computed=computed, number_bytes=4 if wide else 2)

    def fetch(self) -> Path:
        """It is here."""
        return self.path

    def _files(self) -> list[Path]:
        if self.kind == GGUF:
            return [self.path]
        found = {file for each in CHECKPOINT_FILES for file in self.path.glob(each)}
        return sorted(file for file in found if file.is_file())


@dataclass(frozen=True, slots=True)
class HubSource:
    """A model of the Hugging Face Hub; `variant` says which of its GGUF files."""

    model: HubModel
    variant: str | None = None

    @property
    def name(self) -> str:
        """As the user says it."""
        return str(self.model) if self.variant is None else f"{self.model}:{self.variant}"

    @property
    def location(self) -> str:
        """The name, marked as one of the Hub."""
        return f"hf://{self.name}"

    def fingerprint(self) -> str:
        """The name alone: what was exported once is used without asking the network."""
        return self.location

    def facts(self) -> Facts:
        """Asks the Hub which files there are, and how large."""
        files = published_files(self.model)
        chosen = self._gguf_file(files)
        if chosen is not None:
            return Facts(GGUF, files[chosen], files[chosen], number_bytes=_GGUF_NUMBER)
        stored = sum(size for name, size in files.items() if name.endswith(_WEIGHTS_END))
        return Facts(CHECKPOINT, stored, stored)

    def fetch(self) -> Path:
        """Download it, into the cache of the Hub's own library."""
        chosen = self._gguf_file(published_files(self.model))
        if chosen is None:
            return checkpoint_folder(f"hf://{self.model}")
        return download_file(self.model, chosen)

    def _gguf_file(self, files: Mapping[str, int]) -> str | None:
        """Return the GGUF file to take, or None where it is a checkpoint."""
        has_weights = any(name.endswith(_WEIGHTS_END) for name in files)
        if self.variant is None and _CONFIG in files and has_weights:
            return None
        found = _gguf_names(files)
        if self.variant is not None:
            whole = re.compile(
                rf"(?<![a-z0-9]){re.escape(self.variant)}(?![a-z0-9_])", re.IGNORECASE
            )
            found = [name for name in found if whole.search(name)]
        if len(found) == 1:
            return found[0]
        asked = "" if self.variant is None else f" of the variant {self.variant!r}"
        if found:
            raise ArtifactError(
                f"{self.model}: there are {len(found)} GGUF files{asked}, expected one: "
                f"{_listed(found)}. Name one by its variant, such as {self.model}:Q8_0."
            )
        raise ArtifactError(
            f"{self.model}: the model on the Hugging Face Hub is no exported model "
            f"({MANIFEST_NAME}), no checkpoint ({_CONFIG} and *{_WEIGHTS_END}) and has no GGUF "
            f"file{asked}. It has: {_listed(files)}."
        )


def look(source: str | os.PathLike[str]) -> Path | LocalSource | None:
    """Return the folder of an artifact as it was named, or a source; None if nothing is there.

    Raises `ArtifactError` for what is neither.
    """
    path = Path(source)
    if not os.path.lexists(path):
        return None
    if path.is_file():
        if path.suffix.lower() != _GGUF_END:
            raise ArtifactError(f"{path}: is a file, expected {_EXPECTED}.")
        return LocalSource(Path(os.path.abspath(path)), GGUF)
    if not path.is_dir() or os.path.lexists(path / MANIFEST_NAME):
        return path
    return _source_in(path)


_EXPECTED = (
    f"the folder of an exported model ({MANIFEST_NAME}), the folder of a checkpoint ({_CONFIG} and "
    f"*{_WEIGHTS_END}) or a {_GGUF_END} file"
)


def hub_source(source: str | os.PathLike[str]) -> HubSource | None:
    """Return the model of the Hub that this names, with `:VARIANT` behind it or without.

    None for what is no such name. Raises as `HubModel.parse`.
    """
    text = source.as_posix() if isinstance(source, PurePath) else os.fspath(source)
    found = _VARIANT.fullmatch(text)
    if found is not None and (model := HubModel.parse(found[1])) is not None:
        return HubSource(model, found[2])
    model = HubModel.parse(text)
    return None if model is None else HubSource(model)


def _source_in(folder: Path) -> LocalSource:
    names = sorted(each.name for each in folder.iterdir())
    weights = any(name.endswith(_WEIGHTS_END) for name in names)
    files = _gguf_names(names)
    if _CONFIG in names and (weights or not files):
        return LocalSource(Path(os.path.abspath(folder)), CHECKPOINT)
    if len(files) == 1:
        return LocalSource(Path(os.path.abspath(folder / files[0])), GGUF)
    if files:
        raise ArtifactError(
            f"{folder}: holds {len(files)} GGUF files: {_listed(files)}. Name one of them."
        )
    found = f"It holds {_listed(names)}." if names else "It is empty."
    raise ArtifactError(f"{folder}: holds no model, expected {_EXPECTED}. {found}")


def _gguf_names(names: Iterable[str]) -> list[str]:
    return sorted(
        name for name in names if name.lower().endswith(_GGUF_END) and not _NO_MODEL.search(name)
    )


def _listed(names: Iterable[str]) -> str:
    every = sorted(names)
    rest = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + rest


def _config(path: Path) -> Mapping[str, object]:
    """Read for an estimate alone: what is wrong with it, the exporter says."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _table_values(config: Mapping[str, object]) -> int:
    """Values of the memory rows of all tokens; only a MemoryLLM has any."""
    if not isinstance(config.get("memory_intermediate_size"), int) or config.get("beta") == 8:
        return 0
    values = 1
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        factor = config.get(name)
        values *= factor if isinstance(factor, int) else 0
    return values
