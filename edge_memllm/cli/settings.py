"""What a run asks of the model: sampling, length, stop strings, seed. From options or ``/set``."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from edge_memllm.errors import RequestError
from edge_memllm.request import check_speculate
from edge_memllm.sampling import Sampling, check_seed
from edge_memllm.stopping import check_stops

_SAMPLING_TYPES = {"top_k": int}
_SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))
NAMES = (*_SAMPLING_NAMES, "max_new_tokens", "stop", "seed", "speculate")


@dataclass(frozen=True)
class Settings:
    """One set of wishes; changing one makes another set."""

    sampling: Sampling
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: drawn anew for each answer
    speculate: int = 0
    overlays: tuple[str, ...] | None = None  # None: all that are loaded
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, default: Sampling) -> Settings:
        """Options that were given replace ``default``. Raises `RequestError` as `Sampling`."""
        given = {
            name: value
            for name in _SAMPLING_NAMES
            if (value := getattr(arguments, name)) is not None
        }
        if arguments.greedy:
            given["temperature"] = 0.0
        if arguments.seed is not None:
            check_seed(arguments.seed)
        return cls(
            sampling=replace(default, **given),
            max_new_tokens=arguments.max_new_tokens,
            stop=check_stops(arguments.stop),
            stop_token_ids=tuple(arguments.stop_token_id),
            seed=arguments.seed,
            speculate=check_speculate(arguments.speculate),
        )

    def changed(self, name: str, text: str) -> Settings:
        """Return a copy with one value set from text, as ``/set NAME VALUE`` does.

        ``off`` clears the stop string and lets the seed be drawn. Raises `RequestError`.
        """
        name = name.replace("-", "_")
        if name == "stop":
            return replace(self, stop=() if text == "off" else check_stops(text))
        if name == "seed":
            seed = None if text == "off" else check_seed(_parsed(int, name, text))
            return replace(self, seed=seed)
        if name == "speculate":
            return replace(self, speculate=check_speculate(_parsed(int, name, text)))
        if name == "max_new_tokens":
            count = int(_parsed(int, name, text))
            if count < 1:
                raise RequestError(f"max_new_tokens is {count}, expected 1 or more.")
            return replace(self, max_new_tokens=count)
        if name in _SAMPLING_NAMES:
            value: Any = _parsed(_SAMPLING_TYPES.get(name, float), name, text)
            return replace(self, sampling=replace(self.sampling, **{name: value}))
        raise RequestError(f"There is no setting '{name}'. There are: {', '.join(NAMES)}.")

    def lines(self) -> list[str]:
        """One line per setting, in the words that ``/set`` takes."""
        values = {
            **asdict(self.sampling),
            "max_new_tokens": self.max_new_tokens,
            "stop": ", ".join(map(repr, self.stop)) or "off",
            "seed": "off" if self.seed is None else self.seed,
            "speculate": self.speculate,
        }
        return [f"{name} {value}" for name, value in values.items()]


def _parsed(kind: type[int] | type[float], name: str, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} is {text!r}, expected {wanted}.") from None
