"""The codecs that a layer may be stored by: what each takes, and what it loses.

A codec's squared error is close to one part of a row's energy, the same for all tokens, so it is
measured on a sample of them. Knows rows, nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_memllm.codecs import Codec, get_codec
from edge_memllm.codecs.codec import Floats
from edge_memllm.mixed_precision.class_forms import Sizes, Values

# Learned levels beat the fixed ones of as many bits; from 5 bits on even steps are as good.
_NAMES = ("codebook2", "codebook3", "codebook4", "int5", "int6", "int8")
_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Candidates:
    """Codecs by id, their bytes for one layer [C], and their relative squared errors [L, C]."""

    ids: tuple[str, ...]
    sizes: Sizes
    errors: Values


def candidate_ids(width: int) -> tuple[str, ...]:
    """Return the ids of the codecs that rows of `width` values can be stored by."""
    return tuple(f"{name}-g{each}" for name in _NAMES for each in _GROUPS if width % each == 0)


def measure_candidates(rows: Floats, search: bool = False) -> Candidates:
    """Encode rows [N, L, D] by every candidate; `search` for the best scales where one can."""
    width = rows.shape[2]
    ids = candidate_ids(width)
    energy = np.maximum(energies(rows).sum(axis=0), np.finfo(np.float64).tiny)
    sizes, errors = [], []
    for each in ids:
        codec = get_codec(each)
        parts = codec.sizes(1, width)
        sizes.append(parts.scales_bytes + parts.codes_bytes)
        errors.append(energies(coarse_rows(codec, rows, search) - rows).sum(axis=0) / energy)
    return Candidates(ids, np.array(sizes), np.stack(errors, axis=1))


def coarse_rows(codec: Codec, rows: Floats, search: bool = False) -> Floats:
    """Return rows [N, L, D] as they come back from a codec, which learns from them if it learns."""
    _, layers, width = rows.shape
    if codec.parameters_bytes(layers, width):
        fit = codec.fit(layers, width)
        fit.add(rows)
        codec = codec.with_parameters(fit.parameters(), layers, width)
    return codec.decode(*codec.encode(rows, search=search and codec.searches), layers, width)


def energies(rows: Floats) -> Values:
    """Return the sums of squares [N, L] of rows [N, L, D]."""
    return np.asarray(np.square(rows).sum(axis=2, dtype=np.float64))
