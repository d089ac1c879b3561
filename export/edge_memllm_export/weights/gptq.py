"""GPTQ: codes that make up for each other's rounding, judged by what a matrix is fed.

Rounding to nearest keeps every weight close. What counts is the output, and the error that one
column makes there can be taken back by the columns rounded after it. With M = X^T X / n of a
matrix's inputs X, the error of a row w is (w - v) M (w - v)^T, v being the row that codes and
scales stand for. Frantar et al., GPTQ (ICLR 2023), round the columns one by one, the largest inputs
first, each after the errors so far have been carried over to it. The carrying is written here as
feedback through a factor of M, which is the same (Chee et al., QuIP, 2023, theorem 6) and needs
no inverse. Scales are those of rounding to nearest. M is summed up layer by layer, while the
reference is run over a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from edge_memllm.arrays import Floats
from edge_memllm.errors import ExportError
from edge_memllm_export.architectures.architecture import Reference, Stage
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.texts import fitting_text
from edge_memllm_export.weights.kv_steps import text_tokens
from edge_memllm_export.weights.quantizer import QuantizeMatrix, quantize

# A share of the mean square input is added to all: calibration text does not hold all there is.
_DAMPING = 0.01
# Of moments weighted by gradients, which few tokens make up: 0.01 costs a seventh more divergence.
WEIGHTED_DAMPING = 0.1
_STRIDE = 64  # columns whose errors are carried among themselves before they are to all others

_WINDOW = 256
_TOKENS = 8192  # half or twice as many change nothing measurable

LayersDone = Callable[[int], None]


class Feedback:
    """Chooses the codes of matrices that read the same inputs; a ``quantizer.ChooseCodes``.

    ``moment`` is M, float32 [K, K], symmetric; ``damping`` as in `damped`.
    """

    def __init__(
        self, moment: np.ndarray, bits: int, block: int, damping: float = _DAMPING
    ) -> None:
        self._bits = bits
        self._block = block
        wide = _widened(damped(moment, damping), block)
        self._order = np.argsort(-wide.diagonal(), kind="stable")
        # M = U D U^T with U unit upper triangular, out of the lower factor of M turned around.
        # Each of these is as large as M, so none is kept longer than needed.
        turned = self._order[::-1]
        wide = wide[turned[:, None], turned]
        factor = np.linalg.cholesky(wide)
        del wide
        roots = factor.diagonal().copy()
        factor /= roots
        self._powers = np.square(roots[::-1, None])  # D [K, 1]
        # U^T: row k takes the errors of the columns before k.
        self._carry = np.ascontiguousarray(factor[::-1, ::-1].T)

    def __call__(
        self,
        weight: np.ndarray,
        nearest: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
    ) -> np.ndarray:
        """Signed codes [n, K]; a row whose error would not shrink keeps its nearest codes.

        ``zeros`` [n, blocks] are what signed codes lie below the stored ones, None for the middle.
        """
        # Transposed: a column of the matrix is worked on as one run of memory.
        columns, rounded = weight.T[self._order], nearest.T[self._order]
        steps = scales.T[self._order // self._block]
        low = np.full_like(scales, -(2 ** (self._bits - 1))) if zeros is None else -1.0 * zeros
        codes, error = self._round(columns, steps, low.T[self._order // self._block])
        carried = self._carry @ (columns - rounded * steps)
        before = (self._powers * np.square(carried)).sum(axis=0)
        chosen = np.empty_like(codes)
        chosen[self._order] = np.where(error < before, codes, rounded)
        return chosen.T

    def _round(
        self, columns: np.ndarray, steps: np.ndarray, low: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes [K, n] of columns [K, n] with their steps, and the error of each row [n].

        ``low`` [K, n] are the least codes there are.
        """
        high = low + (2**self._bits - 1)
        # The inverse of a subnormal step would be infinite; such a block is zero.
        usable = np.abs(steps) >= np.finfo(np.float32).tiny
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=usable)
        codes, missed, wanted = np.empty_like(columns), np.empty_like(columns), columns.copy()
        for start in range(0, len(columns), _STRIDE):
            stop = min(start + _STRIDE, len(columns))
            wanted[start:stop] += self._carry[start:stop, :start] @ missed[:start]
            for k in range(start, stop):
                np.rint(wanted[k] * inverse[k], out=codes[k])
                np.clip(codes[k], low[k], high[k], out=codes[k])
                np.subtract(columns[k], codes[k] * steps[k], out=missed[k])
                wanted[k + 1 : stop] += self._carry[k + 1 : stop, k, None] * missed[k]
        return codes, (self._powers * np.square(wanted - codes * steps)).sum(axis=0)


def damped(moment: np.ndarray, damping: float = _DAMPING) -> np.ndarray:
    """M as errors are judged by: with a little of every input, and one for those always zero.

    ``damping`` is the share of the mean square input that is added to all.
    """
    power = moment.diagonal()
    out = moment.copy()
    np.fill_diagonal(out, power + np.where(power > 0, damping * power.mean(), np.float32(1)))
    return out


def _widened(moment: np.ndarray, block: int) -> np.ndarray:
    """M with inputs added up to a whole number of blocks; their weights are zero."""
    width = len(moment)
    if width % block == 0:
        return moment
    wide = np.eye(-(-width // block) * block, dtype=np.float32)
    wide[:width, :width] = moment
    return wide


class InputMoments:
    """Second moments by the names of the graph's matrices, asked for in the graph's order.

    ``weights`` say by matrix how much each token counts, as `damage.Sensitivity` does; without
    them all count alike.
    """

    def __init__(
        self,
        reference: Reference,
        tokens: Sequence[int],
        window: int,
        progress: LayersDone,
        weights: Mapping[str, Floats] | None = None,
    ) -> None:
        """Take a text and how many tokens of it go together at most."""
        windows = calibration_windows(tokens, window)
        self._walk = _moments(reference, windows, progress, weights or {})
        self._found: dict[str, np.ndarray] = {}

    def of(self, name: str) -> np.ndarray:
        """``X^T W X / n`` float32 [K, K] of what the matrix ``name`` reads, in the graph's columns.

        Goes on to the layer of this matrix and forgets the one before. Raises ExportError when
        an input is not finite.
        """
        while name not in self._found:
            self._found = next(self._walk)
        moment = self._found[name]
        if not np.isfinite(moment).all():
            raise ExportError(
                f"{name}: what the network feeds this matrix on the calibration text is not "
                "finite. Mend the checkpoint, or export with the graph method rtn."
            )
        return moment


def _moments(
    reference: Reference,
    windows: torch.Tensor,
    progress: LayersDone,
    weights: Mapping[str, Floats],
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the moments of every layer's matrices, then that of the head."""
    heard: _Listening | None = None
    for number, stage in enumerate(reference.stages(windows)):
        if heard is not None:
            yield heard.moments(windows.numel())
            progress(number)
        heard = _Listening(stage, weights)
    assert heard is not None  # the head at least
    yield heard.moments(windows.numel())


def calibration_windows(tokens: Sequence[int], window: int) -> torch.Tensor:
    """Cut tokens into windows [count, length], the rest left out, as moments are measured on.

    ``window`` is the most tokens that the network takes together.
    """
    length = min(window, _WINDOW, len(tokens))
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


class _Listening:
    """Sums of ``w x x^T`` of one stage, growing while it is run, until they are asked for."""

    def __init__(self, stage: Stage, weights: Mapping[str, Floats]) -> None:
        self._stage, self._weights = stage, weights
        self._seen: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._hooks = [
            matrix.module.register_forward_pre_hook(partial(self._add, name))
            for name, matrix in stage.matrices.items()
        ]

    def moments(self, count: int) -> dict[str, np.ndarray]:
        """Moments by the names of the graph's initialisers, in its columns; ends the listening."""
        for hook in self._hooks:
            hook.remove()
        named = {}
        for name, total in self._sums.items():
            moment = total.div_(count).numpy()
            arrange = self._stage.matrices[name].arrange
            if arrange is not None:
                moment = arrange(arrange(moment).T)
            named[self._named(name)] = moment
        return named

    def _add(self, name: str, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].float().flatten(0, 1)
        total = self._sums.setdefault(name, x.new_zeros(x.shape[1], x.shape[1]))
        start = self._seen.get(name, 0)
        self._seen[name] = start + len(x)
        weights = self._weights.get(self._named(name))
        if weights is None:
            total.addmm_(x.T, x)
        else:
            total.addmm_(x.T, x * torch.from_numpy(weights[start : start + len(x), None]))

    def _named(self, name: str) -> str:
        return f"{self._stage.path}.{name}.weight".lstrip(".")


def matrix_quantizer(
    source: Checkpoint, method: str | None, text: str | None, progress: LayersDone
) -> QuantizeMatrix:
    """What quantises a graph's matrices, to be called in the graph's order.

    ``text`` is calibrated on, None takes the one that comes along; ``progress(layers done)`` is
    called by a calibrated method. Raises ExportError for a text that the model cannot read.
    """
    if method != "gptq":
        return quantize
    tokens = text_tokens(source, text, fitting_text(), _TOKENS)
    window = source.spec.max_position_embeddings
    moments = InputMoments(source.architecture.reference(), tokens, window, progress)

    def with_feedback(
        weight: np.ndarray, bits: int, block: int, scale_dtype: np.dtype, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        choose = Feedback(moments.of(name), bits, block)
        return quantize(weight, bits, block, scale_dtype, name, choose)

    return with_feedback
