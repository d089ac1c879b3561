"""Who is compared, with which model and which settings. Imports only the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One runtime with one model.

    ``engine`` names what drives it in `engines`, ``model`` the target of `models` it runs, or
    None for the MemoryLLM artifact given on the command line. ``rehearse``: every measured run is
    done once before, so that the records it reads are in the page cache.
    """

    name: str
    label: str
    engine: str
    model: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    rehearse: bool = False


def _contenders(*all_of_them: Contender) -> dict[str, Contender]:
    return {each.name: each for each in all_of_them}


OURS = "edge"

# The order is the order of the turns in each round.
CONTENDERS = _contenders(
    Contender(OURS, "edge-memllm, table warm", "edge", None, rehearse=True),
    Contender("edge-cold", "edge-memllm, table cold", "edge", None, {"cold": True}),
    Contender("edge-dense", "edge-memllm, dense", "edge", "edge", rehearse=True),
    Contender("llama-cpp", "llama.cpp Q4_0", "llama", "gguf-q4_0", {"mmap": True}),
    Contender(
        "llama-cpp-no-mmap",
        "llama.cpp Q4_0, no mmap",
        "llama",
        "gguf-q4_0",
        {"mmap": False},
    ),
    Contender(
        "llama-cpp-q6-head",
        "llama.cpp Q4_0, no mmap, head Q6_K",
        "llama",
        "gguf-q4_0-q6-head",
        {"mmap": False},
    ),
    Contender(
        "llama-cpp-no-flash",
        "llama.cpp Q4_0, no mmap, no flash attention",
        "llama",
        "gguf-q4_0",
        {"mmap": False, "flash": False},
    ),
    Contender("genai-32", "onnxruntime-genai int4, block 32", "genai", "genai-int4-32"),
    Contender("genai-128", "onnxruntime-genai int4, block 128", "genai", "genai-int4-128"),
)

# Left out unless asked for: settings of a peer that are slower than another one's throughout.
VARIANTS = ("llama-cpp-q6-head",)

# Same weights, no 4 bits: these must agree with the judge to the last digits.
EXACT = _contenders(
    Contender("edge-exact", "edge-memllm fp32", "edge", "edge-exact"),
    Contender("llama-cpp-f16", "llama.cpp F16", "llama", "gguf-f16", {"mmap": False}),
    Contender("genai-fp32", "onnxruntime-genai fp32", "genai", "genai-fp32"),
)
JUDGE = Contender("judge", "transformers, float32", "judge", "llama")


def chosen(names: list[str] | None) -> list[Contender]:
    """The contenders of these names, or all but the variants; always in the order of turns."""
    return [
        each
        for name, each in CONTENDERS.items()
        if (name in names if names else name not in VARIANTS)
    ]
