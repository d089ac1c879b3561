"""Generated pages and pictures: written, or compared with what they would be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write_files(wanted: Mapping[Path, str], command: str, *, check: bool) -> int:
    """Write files, or with `check` return 1 and name those that `command` would change."""
    if not check:
        for file, content in wanted.items():
            file.write_text(content, encoding="utf-8")
        return 0
    wrong = [
        file.name
        for file, content in wanted.items()
        if not file.exists() or file.read_text("utf-8") != content
    ]
    if wrong:
        print(f"{', '.join(wrong)}: not of today, run `{command}`.", file=sys.stderr)
    return 1 if wrong else 0
