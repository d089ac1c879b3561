"""A GGUF file in llama.cpp's own types, made by its own quantiser: compiled llama.cpp is needed."""

from __future__ import annotations

import os
from pathlib import Path

# In the order of their sizes. Where a matrix's rows are no multiple of 256, as most of SmolLM2's
# are not, llama.cpp takes its next larger type of blocks of 32 in place of one of the K types.
TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def llama_file(source: Path, kind: str, folder: Path) -> Path:
    """Return the source in a type of `TYPES`, quantised into `folder` unless it is there.

    Raises `AttributeError` where llama.cpp is only prebuilt: that has no quantiser.
    """
    from benchmarks.peers.llama_library import llama_library

    out = folder / f"{source.stem.removesuffix('-F16')}-{kind}.gguf"
    if out.exists():
        return out
    library = llama_library()
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = os.cpu_count() or 1
    part = out.with_suffix(".part")
    code = library.llama_model_quantize(str(source).encode(), str(part).encode(), options)
    if code:
        raise RuntimeError(f"{source}: llama.cpp's quantiser returned {code}.")
    part.replace(out)
    return out


def tensor_bytes(file: Path) -> int:
    """Bytes of a GGUF file's tensors, without its vocabulary and other metadata."""
    import gguf

    return sum(int(each.n_bytes) for each in gguf.GGUFReader(file).tensors)
