"""The Python that a program runs in, as something that can be started.

`sys.executable` may be empty, or the program that Python is embedded in (uwsgi, Blender): starting
that would start the program once more.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_PYTHON = re.compile(r"(python|pypy|graalpy)[\d.]*[a-z]?(-\w+)?(\.exe)?", re.IGNORECASE)


def interpreters() -> Iterator[str]:
    """Yield paths of what is this Python, by its name and place; the likeliest first."""
    seen = set[str]()
    for path in _candidates():
        known = path in seen or not _PYTHON.fullmatch(Path(path).name)
        seen.add(path)
        if not known and os.path.isfile(path) and os.access(path, os.X_OK):
            yield path


def _candidates() -> Iterator[str]:
    for path in (sys.executable, getattr(sys, "_base_executable", None)):
        if path:
            yield path
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    folders = [Path(prefix, "bin") for prefix in prefixes]
    folders += map(Path, filter(None, [sysconfig.get_config_var("BINDIR"), *prefixes]))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    end = ".exe" if os.name == "nt" else ""
    for folder in folders:
        for name in (f"python{version}", f"python{sys.version_info.major}", "python"):
            yield str(folder / f"{name}{end}")
