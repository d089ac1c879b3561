"""An artifact of the Hub becomes a folder of plain files, in the cache's part for libraries.

The library's own cache holds links, which an artifact must not contain. So files lie in a folder
named after the digest of the manifest: it holds what that manifest describes, or a part of it, and
never anything else, whatever happens to the repository.

One file after the other goes on where an earlier run ended: what is not complete lies in the folder
`.partial`, and a file gets its name when its digest is the manifest's. The library's own downloads
start anew when a process has died, and a table may have many gigabytes. Checkpoints stay in the
library's cache, whose links an exporter follows: a checkpoint is its user's own choice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edge_memllm.artifact.atomic import move_whole, write_whole
from edge_memllm.artifact.manifest import MANIFEST_NAME, FileSpec, Manifest
from edge_memllm.artifact.strict_json import MAX_JSON_BYTES
from edge_memllm.errors import ArtifactError, CorruptionError, StorageError
from edge_memllm.hub.names import HubModel, explained, import_hub
from edge_memllm.text import TEXT_FILES

_PARTIAL = ".partial"  # a name no file of a manifest can have

_LIBRARY = "edge-memllm"  # the folder's name in the assets of the cache
_NO_ARTIFACT = " It is no exported artifact: 'edge-memllm export' makes one of a checkpoint."

# The weights, their index and configuration, and all that an export copies. No pickles, no code.
CHECKPOINT_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *TEXT_FILES,
)


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


def download_artifact(
    model: HubModel,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Download what the model's manifest names, and return the folder with all of it.

    What is there already, from this or an interrupted run, is not downloaded again: a file goes
    on from the byte where it ended. Every file is compared with the manifest's size and sha256
    digest when it has arrived. Without a connection, what was downloaded before is used.

    `cache_dir` replaces the library's cache, `token` is for private models (None: as logged in),
    `local_files_only` asks nothing of the network, `force_download` starts from nothing.

    Raises `ArtifactError` for a model that is not there, cannot be reached or is no artifact,
    `CorruptionError` for bytes that are not the manifest's, `StorageError` when the disk is full,
    `RuntimeUnavailableError` without the package huggingface_hub.
    """
    hub = import_hub()
    from huggingface_hub.utils import WeakFileLock

    with explained(model, MANIFEST_NAME, _NO_ARTIFACT):
        found = hub.hf_hub_download(
            model.repository,
            MANIFEST_NAME,
            revision=model.revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            tqdm_class=_bounded_bar(model),
        )
    described = _Described.read(model, Path(found))
    folder = _folder(hub, model, described.digest, cache_dir)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        if force_download:
            _clear(folder)
        transfer = Transfer(hub, model, described.commit, folder, token, cache_dir)
        described.complete(transfer, local_files_only)
    return folder


def _bounded_bar(model: HubModel) -> type[Any]:
    """Return a progress bar that ends a download of more than a manifest may have.

    It is the one thing of ours that the library asks on the way; the server may never end.
    """
    from huggingface_hub.utils import tqdm

    class Bounded(tqdm):  # type: ignore[misc]
        arrived = 0.0

        def update(self, n: float | None = 1) -> bool | None:
            self.arrived += n or 0
            if self.arrived > MAX_JSON_BYTES:
                raise ArtifactError(
                    f"{model}: more than {MAX_JSON_BYTES} bytes of {MANIFEST_NAME} arrive, which "
                    "no manifest has. It is no exported artifact."
                )
            found: bool | None = super().update(n)
            return found

    return Bounded


@dataclass(frozen=True, slots=True)
class _Described:
    """A manifest of the Hub: what is to be downloaded, and from which commit."""

    content: bytes
    manifest: Manifest
    commit: str

    @classmethod
    def read(cls, model: HubModel, path: Path) -> _Described:
        """Read it from the library's cache, where the folder is named after the commit."""
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        manifest = Manifest.from_json(content, f"{model}: {MANIFEST_NAME}")
        return cls(content, manifest, path.parent.name)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def complete(self, transfer: Transfer, local_files_only: bool) -> None:
        """Download what the folder lacks; the manifest comes last, when all else is there."""
        folder = transfer.folder
        missing = {
            name: spec
            for name, spec in self.manifest.files.items()
            if not is_there(folder / name, spec)
        }
        if missing and local_files_only:
            raise ArtifactError(
                f"{transfer.model}: not downloaded yet: {', '.join(missing)}, and local_files_only "
                "asks nothing of the network. Leave it out once."
            )
        _require_space(folder, sum(bytes_left(folder, name, missing[name]) for name in missing))
        for name, spec in missing.items():
            transfer.fetch(name, spec)
        transfer.end()
        manifest = folder / MANIFEST_NAME
        if not manifest.is_file() or manifest.read_bytes() != self.content:
            write_whole(manifest, self.content)


def _folder(hub: Any, model: HubModel, digest: str, cache_dir: Any) -> Path:
    assets = None if cache_dir is None else Path(cache_dir) / "assets"
    place: Path = hub.cached_assets_path(_LIBRARY, model.repository, digest[:32], assets_dir=assets)
    return place


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder}: {needed:,} bytes are to be downloaded, {free:,} are free. Free some space, "
            "or set HF_HOME to a folder on another disk."
        )


def _clear(folder: Path) -> None:
    """Remove what is in the folder; the manifest first, so that nothing looks complete."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
    folder.mkdir()


def artifact_folder(
    source: str | os.PathLike[str], *, revision: str | None = None, **options: Any
) -> Path:
    """Return the folder of an artifact, downloaded first when `source` names one of the Hub.

    A folder of this machine is returned as it is; `org/name` and `hf://org/name@revision` are of
    the Hub, where `revision` comes before the one in the name. `options` are those of
    `edge_memllm.hub.download.download_artifact`, and so are the errors; a `revision` of a folder
    is a `RequestError`.
    """
    model = HubModel.wanted(source, revision)
    if model is None:
        return Path(source)

    return download_artifact(model, **options)


def checkpoint_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the folder of a checkpoint, downloaded first when `source` names one of the Hub.

    Arguments and errors are those of `edge_memllm.hub.artifact_folder`.
    """
    model = HubModel.wanted(source, revision)
    if model is None:
        return Path(source)
    hub = import_hub()
    with explained(model, "checkpoint"):
        folder = hub.snapshot_download(
            model.repository,
            revision=model.revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(CHECKPOINT_FILES),
        )
    return Path(folder)


def published_files(model: HubModel) -> dict[str, int]:
    """Return the files of a model of the Hub, each with its bytes.

    Raises `ArtifactError` for a model that is not there or cannot be asked for.
    """
    hub = import_hub()
    with explained(model, "list of files"):
        found = hub.HfApi().list_repo_tree(
            model.repository, revision=model.revision, recursive=True
        )
        return {each.path: each.size for each in found if hasattr(each, "size")}


def download_file(model: HubModel, name: str) -> Path:
    """Download one file of a model into the library's cache, and return where it is.

    Raises `ArtifactError` as `published_files`, and `StorageError` when the disk is full.
    """
    hub = import_hub()
    with explained(model, name):
        return Path(hub.hf_hub_download(model.repository, name, revision=model.revision))
