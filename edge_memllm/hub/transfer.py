"""One file after the other from the Hub into a folder, going on where an earlier run ended.

What is not complete lies in the folder `.partial`; a file gets its name when its digest is the
manifest's. The library's own downloads start anew when a process has died, and a table may have
many gigabytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edge_memllm.atomic import move_whole
from edge_memllm.errors import CorruptionError
from edge_memllm.hub.failures import explained
from edge_memllm.hub.names import HubModel
from edge_memllm.manifest import FileSpec

_PARTIAL = ".partial"  # a name no file of a manifest can have


def is_there(path: Path, spec: FileSpec) -> bool:
    """Whether a plain file of the right size is there: its digest was right when it came."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == spec.bytes


def bytes_left(folder: Path, name: str, spec: FileSpec) -> int:
    """Return how many bytes of a file have not arrived."""
    partial = folder / _PARTIAL / name
    return spec.bytes - (partial.stat().st_size if partial.is_file() else 0)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Downloads files of one commit of a model into `folder`. The folder must not be shared."""

    hub: Any
    model: HubModel
    commit: str
    folder: Path
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None

    def fetch(self, name: str, spec: FileSpec) -> None:
        """Bring one file and check it; a progress bar shows how far it is, on a terminal.

        Raises `CorruptionError` when it is not what the manifest says, and what
        `failures.explained` makes of the library's errors. What has arrived stays for the next
        time, unless it is wrong.
        """
        partial = self.folder / _PARTIAL / name
        partial.parent.mkdir(exist_ok=True)
        with explained(self.model, name):
            try:
                if not self._copied(name, partial):
                    self._download(name, spec, partial)
            except CorruptionError:
                partial.unlink(missing_ok=True)
                raise
            found = _sha256(partial)
        if found != spec.sha256:
            partial.unlink()
            raise CorruptionError(
                f"{self.model}: {name} has arrived with sha256 {found[:12]}, the manifest says "
                f"{spec.sha256[:12]}. Try again; if it stays, the model was uploaded incompletely."
            )
        with explained(self.model, name):
            move_whole(partial, self.folder / name)

    def end(self) -> None:
        """Remove the folder of what is incomplete: nothing is."""
        shutil.rmtree(self.folder / _PARTIAL, ignore_errors=True)

    def _copied(self, name: str, partial: Path) -> bool:
        """Copy the file from the library's own cache, if somebody had it downloaded there."""
        cached = self.hub.try_to_load_from_cache(
            self.model.repository, name, cache_dir=self.cache_dir, revision=self.commit
        )
        if not isinstance(cached, str):
            return False
        shutil.copyfile(cached, partial)
        return True

    def _download(self, name: str, spec: FileSpec, partial: Path) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = self.hub.hf_hub_url(self.model.repository, name, revision=self.commit)
        self._check_size(name, spec, url)
        headers = build_hf_headers(token=self.token)
        with partial.open("ab") as file:
            if file.tell() > spec.bytes:
                file.truncate(0)
                file.seek(0)
            http_get(
                url,
                _Bounded(file, spec.bytes, self._too_much(name, spec)),
                resume_size=os.fstat(file.fileno()).st_size,
                # A range of compressed bytes is not a range of the file.
                headers=headers | {"Accept-Encoding": "identity"},
                expected_size=spec.bytes,
                displayed_filename=name,
            )

    def _too_much(self, name: str, spec: FileSpec) -> CorruptionError:
        return CorruptionError(
            f"{self.model}: more of {name} arrives than the {spec.bytes} bytes that it is said to "
            "have. Ask another server, or tell whoever runs this one."
        )

    def _check_size(self, name: str, spec: FileSpec, url: str) -> None:
        """Ask first: a file of another size need not come at all."""
        found = self.hub.get_hf_file_metadata(url, token=self.token).size
        if found != spec.bytes:
            raise CorruptionError(
                f"{self.model}: {name} has {found} bytes on the Hugging Face Hub, the manifest "
                f"says {spec.bytes}. The model was uploaded incompletely; upload it again."
            )


class _Bounded:
    """A file that is being downloaded, and takes no more than it is said to have.

    The library compares sizes when a server has ended, which one may never do.
    """

    def __init__(self, file: BinaryIO, most: int, error: CorruptionError) -> None:
        self._file = file
        self._most = most
        self._error = error

    def write(self, data: bytes) -> int:
        """Write, or raise the error."""
        if self._file.tell() + len(data) > self._most:
            raise self._error
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
