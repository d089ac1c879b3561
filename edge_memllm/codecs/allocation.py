"""Who gets how many bits: the codec of every layer, for each class of tokens.

Knows ids and token counts; what the ids mean is the business of `mixed`, and how an allocation is
found that of an optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_CLASSES = 16
PART_NAMES = (
    "int8",
    "int6",
    "int5",
    "int4",
    "codebook4",
    "codebook3",
    "codebook2",
    "int3",
    "int2",
)
PART_GROUPS = (32, 64, 128)
PARTS = tuple(f"{name}-g{group}" for name in PART_NAMES for group in PART_GROUPS)


@dataclass(frozen=True, slots=True)
class TokenClass:
    """Tokens whose records are alike: how many, and the codec id of each layer."""

    tokens: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """`classes[c][l]` is the codec id of layer l for tokens of class c, `class_of` [V] their class.

    Class 0 lies first in the file: it should be that of the most frequent tokens. Raises
    `ValueError` for ids that cannot be mixed, classes of different depth or without tokens, and
    tokens of a class that is not there.
    """

    classes: tuple[tuple[str, ...], ...]
    class_of: NDArray[np.uint8]

    def __post_init__(self) -> None:
        _check_class_of(self.class_of, len(self.classes))
        check_classes(self.token_classes)

    @property
    def token_classes(self) -> tuple[TokenClass, ...]:
        """The classes with their counts of tokens, as a manifest says them."""
        counts = np.bincount(self.class_of, minlength=len(self.classes)).tolist()
        return tuple(map(TokenClass, counts, self.classes))


def check_classes(classes: tuple[TokenClass, ...]) -> None:
    """Raise `ValueError` for classes that no table can have."""
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes of tokens, expected 1 to {MOST_CLASSES}.")
    depth = len(classes[0].layers)
    for number, each in enumerate(classes):
        if each.tokens < 1:
            raise ValueError(f"class {number} has {each.tokens} tokens, expected at least one.")
        if not each.layers or len(each.layers) != depth:
            raise ValueError(
                f"class {number} has codecs for {len(each.layers)} layers, class 0 for {depth}; "
                "expected as many, and at least one."
            )
        if unknown := [part for part in each.layers if part not in PARTS]:
            raise ValueError(
                f"class {number}: codec '{unknown[0]}' cannot be mixed with others, expected one "
                f"of {', '.join(PART_NAMES)} with a group of 32, 64 or 128."
            )


def smallest_group(classes: tuple[TokenClass, ...]) -> int:
    """Return the smallest group of all layers of checked classes."""
    return min(int(part.rpartition("-g")[2]) for each in classes for part in each.layers)


def _check_class_of(class_of: NDArray[np.uint8], classes: int) -> None:
    if class_of.ndim != 1 or class_of.dtype != np.uint8:
        raise ValueError(
            f"classes of tokens are {class_of.dtype} {class_of.shape}, expected uint8 [V]."
        )
    if class_of.size and class_of.max() >= classes:
        token = int(np.argmax(class_of >= classes))
        raise ValueError(
            f"token {token} is of class {class_of[token]}, expected one from 0 to {classes - 1}."
        )
