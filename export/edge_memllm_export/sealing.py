"""Files that are done: forced to the disk, and described as the manifest does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edge_memllm.manifest import FileSpec


def seal(path: Path) -> FileSpec:
    """Force a file to the disk; its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSpec(os.fstat(file.fileno()).st_size, digest)
