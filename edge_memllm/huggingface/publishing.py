"""An artifact copied to another folder or to the Hugging Face Hub: exactly its own files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edge_memllm.atomic import not_written, whole_folder
from edge_memllm.errors import RequestError
from edge_memllm.hub.failures import explained, import_hub
from edge_memllm.hub.names import HubModel
from edge_memllm.manifest import MANIFEST_NAME, Manifest


def copy_artifact(manifest: Manifest, source: Path, target: Path) -> None:
    """Copy all files to the folder `target`, which must be new or empty: all of them or none."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(
            f"{target}: is not an empty folder, and nothing is replaced. Save into a new one."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as draft:
            for name in (*manifest.files, MANIFEST_NAME):
                shutil.copyfile(source / name, draft / name)
    except OSError as error:
        raise not_written(target, error) from error


def upload_artifact(
    manifest: Manifest,
    source: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload the artifact in one commit, so that nobody sees half of it; return its address."""
    hub = import_hub()
    model = HubModel(repo_id, revision)
    with explained(model, "repository"):
        api = hub.HfApi(library_name="edge-memllm", token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=source,
            allow_patterns=[*manifest.files, MANIFEST_NAME],
            revision=revision,
            commit_message=commit_message,
        )
    return str(made)
