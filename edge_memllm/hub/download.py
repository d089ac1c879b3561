"""An artifact of the Hub becomes a folder of plain files, in the cache's part for libraries.

The library's own cache holds links, which an artifact must not contain. So files lie in a folder
named after the digest of the manifest: it holds what that manifest describes, or a part of it, and
never anything else, whatever happens to the repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_memllm.atomic import write_whole
from edge_memllm.errors import ArtifactError, StorageError
from edge_memllm.hub.failures import explained, import_hub
from edge_memllm.hub.names import HubModel
from edge_memllm.hub.transfer import Transfer, bytes_left, is_there
from edge_memllm.manifest import MANIFEST_NAME, Manifest
from edge_memllm.strict_json import MAX_JSON_BYTES

_LIBRARY = "edge-memllm"  # the folder's name in the assets of the cache
_NO_ARTIFACT = " It is no exported artifact: 'edge-memllm export' makes one of a checkpoint."


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
