"""The metadata and tensors' shapes of a network in a GGUF file, read with checks.

What a key may hold is asked here, what it means for a network its readers know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from functools import cache
from typing import Any, NamedTuple, NoReturn

import numpy as np
from gguf.constants import Keys

from edge_memllm.errors import ExportError

EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
ROTARY_FACTORS = "rope_freqs.weight"


class Parameter(NamedTuple):
    """A parameter of a network, and the tensor of a file that it is, or a part of.

    Attributes:
        name: In transformers.
        tensor: In the file.
        shape: Of the tensor.
        part: Which matrix of a stack [n, rows, columns] it is; None for all of the tensor.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    part: int | None = None


# Keys under an architecture's name that change nothing.
_OF_NO_EFFECT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_MOST = 1 << 24


class Metadata:
    """What a file says of its network. Errors begin with `where`."""

    def __init__(
        self,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        where: str,
        known: Collection[str],
    ) -> None:
        """Take all keys, the shape of every tensor by name, and the architectures there may be.

        Raises:
            ExportError: The file is no model, a part of one, or of another architecture.
        """
        self._values = values
        self._where = where
        self.shapes = shapes
        self._check_whole()
        found = values.get("general.architecture")
        if not isinstance(found, str) or found not in known:
            self.refuse(
                f"general.architecture is {found!a:.40}, expected one of {', '.join(known)}.",
                "Models of other families are not read.",
            )
        self.architecture = found

    def refuse(self, what: str, advice: str = "Give the model as a folder instead.") -> NoReturn:
        """Raise the ExportError that says this of the file."""
        raise ExportError(f"{self._where}: {what} {advice}")

    def _check_whole(self) -> None:
        kind = self._values.get("general.type", "model")
        if kind != "model":
            self.refuse(f"is of type {kind!a:.40}, expected a model.", "Give the model's file.")
        parts = self._values.get("split.count", 0)
        if parts not in (0, 1):
            self.refuse(
                f"is one of {parts!a:.20} parts of a model.",
                "Join them with llama-gguf-split --merge.",
            )

    def key(self, name: str) -> str:
        """The whole key of a name under the architecture's."""
        return f"{self.architecture}.{name}"

    def get(self, name: str, default: Any = None) -> Any:
        """What is said under a name, whatever it is."""
        return self._values.get(self.key(name), default)

    def refuse_unfollowed(self, followed: Set[str]) -> None:
        """Refuse what the gguf library knows, is not zero, and no reader here would look at."""
        for name in sorted(_known_keys() - followed - _OF_NO_EFFECT):
            value = self.get(name)
            if value is not None and np.any(np.asarray(value) != 0):
                self.refuse(
                    f"{self.key(name)} is {value!a:.60}, which the network here does not follow."
                )
        if self.get("attention.causal", True) is not True:
            self.refuse("attends to what comes later, so it does not generate text.")

    def number(self, name: str, least: float, most: float, default: Any = None) -> Any:
        """A number; one for each layer only where all are equal. Whole, if `least` is."""
        found = self.get(name, default)
        if isinstance(found, np.ndarray) and found.size and (found == found[0]).all():
            found = found[0].item()
        whole = isinstance(least, int)
        if type(found) not in ((int,) if whole else (int, float)) or not least <= found <= most:
            same = ", the same in all layers" if isinstance(found, np.ndarray) else ""
            self.refuse(
                f"{self.key(name)} is {found!a:.60}, expected a {'whole ' if whole else ''}number "
                f"from {least} to {most}{same}."
            )
        return found if whole else float(found)

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A number of things."""
        return int(self.number(name, least, _MOST, default))

    def counts(self, name: str, layers: int) -> list[int]:
        """A number of things in each layer; one that is said alone is that of all."""
        found = self.get(name)
        if not isinstance(found, np.ndarray):
            return [self.count(name)] * layers
        counts: list[int] = found.tolist()
        if found.dtype.kind not in "iu" or len(counts) != layers or not 1 <= min(counts) <= _MOST:
            self.refuse(
                f"{self.key(name)} is {found!a:.60}, expected {layers} whole numbers, one for each "
                "layer."
            )
        return counts

    def expect_count(self, name: str, expected: int, what: str) -> None:
        """Refuse a number that is there and another than the network's."""
        if self.count(name, expected) != expected:
            self.refuse(f"{self.key(name)} is {self.count(name)}, expected {expected}, {what}.")

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor; ExportError where there is none."""
        if tensor not in self.shapes:
            self.refuse(f"has no tensor {tensor}.", "The file is incomplete: get it again.")
        return self.shapes[tensor]


@cache
def _known_keys() -> frozenset[str]:
    """Every key under an architecture's name that the gguf library knows, without that name."""
    prefix = "{arch}."
    found: set[str] = set()
    groups: list[type] = [Keys]
    while groups:
        for value in vars(groups.pop()).values():
            if isinstance(value, type):
                groups.append(value)
            elif isinstance(value, str) and value.startswith(prefix):
                found.add(value.removeprefix(prefix))
    return frozenset(found)
