"""All there is to a session, and what it came from: plain values, as a file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError
from edge_memllm.manifest import Manifest
from edge_memllm.overlays.shelf import Selection
from edge_memllm.sampling import Sampling


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """A session between two calls. `logits` are there exactly when all tokens are computed."""

    sampling: Sampling
    seed: int
    draws: np.random.Generator  # of PCG64
    tokens: tuple[int, ...] = ()
    computed: int = 0  # of the tokens, from the front
    logits: NDArray[np.float32] | None = None  # [V]
    held: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # what `KVCache.held` gives


@dataclass(frozen=True, slots=True)
class Origin:
    """What keys and values depend on, beside the text."""

    identity: str  # of the model
    artifact: str  # fingerprint of the manifest, which names every file by its digest
    codec: str  # of the rows as they are read: another one for coarse quality
    overlays: tuple[str, ...]  # names, in their order
    digests: tuple[str, ...]  # what these overlays do

    @classmethod
    def of(cls, manifest: Manifest, records: Selection) -> Origin:
        """Return the origin of what a model computes from these records; reads the overlays."""
        return cls(
            identity=manifest.model.identity,
            artifact=manifest.fingerprint,
            codec=records.source.layout.codec.id,
            overlays=records.names,
            digests=tuple(overlay.digest() for overlay in records.overlays),
        )

    def check(self, model: Origin, where: str) -> None:
        """Raise `RequestError` unless this is of `model`, whatever the overlays."""
        if self.identity != model.identity:
            raise RequestError(
                f"{where}: a session of model {self.identity[:19]}, this is {model.identity[:19]}. "
                "Load the model it was saved with."
            )
        if self.artifact != model.artifact:
            raise RequestError(
                f"{where}: a session of another export of this model: its graph, its table or "
                "its settings differ. Load the artifact it was saved with."
            )
        if self.codec != model.codec:
            raise RequestError(
                f"{where}: its rows were read as {self.codec}, here they are read as "
                f"{model.codec}. Load the model with the table quality it was saved with."
            )

    def check_overlays(self, model: Origin, where: str) -> None:
        """Raise `RequestError` unless the overlays of `model`, called the same, do the same."""
        for name, found, expected in zip(self.overlays, self.digests, model.digests, strict=True):
            if found != expected:
                raise RequestError(
                    f"{where}: the overlay '{name}' that is loaded is not the one it was saved "
                    "with. Load that one."
                )
