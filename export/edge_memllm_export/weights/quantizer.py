"""Rounding to nearest: a weight matrix in 2, 4 or 8 bits, one scale a block, no zero points.

It knows numpy and nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from edge_memllm.errors import ExportError
from edge_memllm_export.weights.own_grids import own_grid
from edge_memllm_export.weights.stored_matrix import Blocks, StoredMatrix, StoreMatrix, packed

BLOCKS = (32, 64, 128, 256)
# ONNX Runtime has no kernel of 2 bits for larger ones: such products take 200 times as long.
_LARGEST_OF_2_BITS = 128
# Large blocks are read faster and keep less of the weights. Matrices that fit a cache gain little.
_WIDE_BLOCK, _NARROW_BLOCK, _WIDE_FROM = 128, 32, 1024
# The extreme weight of a block lands on one of these codes; the least squared error wins. A last
# code beyond -8 clips the extreme a little. Against plain -8 this takes a tenth off the error; of 2
# bits, where most is clipped, a fifth against plain -2. With -1 and -2 grids of 2 bits stay exact.
_EXTREME_CODES = {
    2: (-4.0, -3.5, -3.0, -2.5, -2.25, -2.0, -1.5, -1.0),
    4: (-8.5, -8.0, -7.5, -7.0, -6.5, -6.0),
    8: (-128.0, -127.0),
}
CHUNK_WEIGHTS = 1 << 20  # weights worked on at a time: the temporaries stay in the cache

# Graph weights -> (dtype of all activations, bits of a quantised matrix or None).
# float16 activations are the one form that runs on CPU and CUDA alike.
WEIGHT_FORMS: dict[str, tuple[str, int | None]] = {
    "int2": ("float16", 2),
    "int4": ("float16", 4),
    "int8": ("float16", 8),
    "fp16": ("float16", None),
    "fp32": ("float32", None),
}
# Fewest bits first.
QUANTISED = tuple(form for form, (_, bits) in WEIGHT_FORMS.items() if bits is not None)


def compute_dtype(weights: str) -> str:
    """The dtype of all activations of a graph whose weights are stored as the manifest says."""
    return WEIGHT_FORMS[weights][0] if weights in WEIGHT_FORMS else "float16"


METHODS = ("rtn", "gptq")
_CALIBRATED = ("auto", *QUANTISED)  # unless another method is asked for


def block_for(columns: int, block: int | None) -> int:
    """The block asked for, or without one that for a matrix of so many columns."""
    return block or (_WIDE_BLOCK if columns >= _WIDE_FROM else _NARROW_BLOCK)


def quantize(
    weight: np.ndarray,
    bits: int,
    block: int,
    scale_dtype: np.dtype,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """``weight`` [N, K] of any float dtype -> codes uint8 and scales, laid out as in `Blocks`.

    Every weight takes the nearest code. Raises ExportError naming the weight
    when a value is not finite or a scale leaves the range of ``scale_dtype``.
    """
    N, K = weight.shape
    blocks = -(-K // block)
    codes = np.empty((N, blocks, block * bits // 8), np.uint8)
    scales = np.empty((N, blocks), scale_dtype)
    step = max(1, CHUNK_WEIGHTS // (blocks * block))
    for start in range(0, N, step):
        stop = min(start + step, N)
        chunk = np.zeros((stop - start, blocks * block), np.float32)
        chunk[:, :K] = weight[start:stop]
        signed, scale = _round_blocks(chunk.reshape(-1, block), bits, scale_dtype)
        if not np.isfinite(scale).all():
            raise ExportError(
                f"{name}: a weight between rows {start} and {stop} is not finite or too large for "
                f"{np.dtype(scale_dtype).name} scales. Mend the checkpoint, or export with "
                "graph weights fp32."
            )
        scales[start:stop] = scale.reshape(stop - start, blocks)
        unsigned = (signed + 2 ** (bits - 1)).astype(np.uint8)
        codes[start:stop] = packed(unsigned, bits).reshape(stop - start, blocks, -1)
    return codes, scales


def uniform(
    weights: str, block: int | None = None, matrices: Mapping[str, str] | None = None
) -> StoreMatrix:
    """Round all matrices to one form of `WEIGHT_FORMS`, but for kinds that ``matrices`` names.

    ``block`` weights share a scale, None chooses by the matrix. Weights that lie on a grid already
    are kept as they are.
    """
    others = matrices or {}
    dtype = np.dtype(compute_dtype(weights))

    def store(name: str, weight: np.ndarray) -> Sequence[StoredMatrix] | None:
        _, bits = WEIGHT_FORMS[others.get(kind_of(name), weights)]
        if bits is None:
            return None
        columns = weight.shape[1]
        size, grid = block_for(columns, block), own_grid(weight)
        if grid is not None and grid.fits(bits, size):
            return [StoredMatrix((grid.stored(weight, bits, size, dtype),))]
        codes, scales = quantize(weight, bits, size, dtype, name)
        return [StoredMatrix((Blocks(columns, bits, codes, scales),))]

    return store


def _round_blocks(
    blocks: np.ndarray, bits: int, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [M, G] -> signed codes float32 [M, G] and scales [M, 1] of least squared error."""
    peak = np.abs(blocks).argmax(axis=1)[:, None]
    extreme = np.take_along_axis(blocks, peak, axis=1)
    first, *others = _EXTREME_CODES[bits]
    codes, scale, least = _codes(blocks, extreme, first, bits, scale_dtype)
    for extreme_code in others:
        found, step, error = _codes(blocks, extreme, extreme_code, bits, scale_dtype)
        better = error < least
        np.copyto(codes, found, where=better)
        np.copyto(scale, step, where=better)
        np.copyto(least, error, where=better)
    return codes, scale


def _codes(
    blocks: np.ndarray, extreme: np.ndarray, extreme_code: float, bits: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest codes [M, G] for the extreme on a given code; scales and squared errors [M, 1]."""
    limit = 2 ** (bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (extreme / np.float32(extreme_code)).astype(dtype)
        step = scale.astype(np.float32)
        # The inverse of a subnormal step would be infinite; such a block becomes zero.
        usable = np.abs(step) >= np.finfo(np.float32).tiny
        inverse = np.divide(1, step, out=np.zeros_like(step), where=usable)
        codes = np.clip(np.rint(blocks * inverse), -limit, limit - 1)
        error = np.square(codes * step - blocks).sum(axis=1, keepdims=True)
    return codes, scale, error


def kind_of(name: str) -> str:
    """The kind of a matrix of the graph: down_proj of model.layers.3.mlp.down_proj.weight."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def named_form(graph_weights: str, matrices: Mapping[str, str]) -> str:
    """The form that a manifest names, by which the graph is judged: that of fewest bits."""
    if graph_weights not in QUANTISED:
        return graph_weights
    return min((graph_weights, *matrices.values()), key=QUANTISED.index)


def check_block(block: int | None, forms: Collection[str]) -> None:
    """Refuse a block that there is not, or that matrices in one of these forms cannot have."""
    if block is None:
        return
    if block not in BLOCKS:
        known = ", ".join(map(str, BLOCKS))
        raise ExportError(f"graph block {block}, expected one of {known}.")
    main, *_ = forms
    if main not in QUANTISED:
        raise ExportError(
            f"graph block {block} is for graphs in {', '.join(QUANTISED)}; the graph weights are "
            f"{main}. Leave it out, or choose one of these."
        )
    if block > _LARGEST_OF_2_BITS and any(WEIGHT_FORMS[form][1] == 2 for form in forms):
        raise ExportError(
            f"graph block {block} for int2: products of 2 bits are fast up to blocks of "
            f"{_LARGEST_OF_2_BITS}. Choose that or less."
        )


def check_matrix_forms(
    forms: Mapping[str, str], graph_weights: str, kinds: Collection[str]
) -> None:
    """Refuse kinds that are not the graph's, and forms that do not go with the main one."""
    if forms and WEIGHT_FORMS.get(graph_weights, ("", None))[1] is None:
        raise ExportError(
            f"matrix weights are for graphs in {', '.join(QUANTISED)}; the graph weights are "
            f"{graph_weights}. Leave them out, or choose one of these."
        )
    for kind, form in forms.items():
        if kind not in kinds:
            raise ExportError(
                f"matrix weights for {kind!r}, this network's graph has {', '.join(kinds)}."
            )
        if form not in QUANTISED:
            raise ExportError(
                f"matrix weights {form!r} for {kind}, expected one of {', '.join(QUANTISED)}."
            )


def quantisation_method(method: str | None, graph_weights: str) -> str | None:
    """The method asked for, or the form's own; None where nothing is quantised."""
    default = "gptq" if graph_weights in _CALIBRATED else None
    if method is None:
        return default
    if method not in METHODS:
        raise ExportError(f"graph method {method!r}, expected one of {', '.join(METHODS)}.")
    if default is None or graph_weights == "auto":
        raise ExportError(
            f"graph method {method} is for graphs in {', '.join(QUANTISED)}; the graph weights are "
            f"{graph_weights}. Leave it out, or choose one of these."
        )
    return method
