"""Points in the plane for vectors of many numbers, so that neighbours stay neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_memllm.interpretation.learning import learning

Floats = NDArray[np.float32]

_FEWEST = 100  # points for t-SNE, which has little to go by with fewer
_PERPLEXITY = 30
_COMPONENTS = 50  # that t-SNE is given, as its authors advise for long vectors
_START = 1e-4  # standard deviation of where t-SNE starts, as in scikit-learn
_LEAST = 1e-12


def plane(points: Floats, seed: int) -> tuple[NDArray[np.float64], str]:
    """Return a place [N, 2] for each point [N, W], from -1 to 1, and how they were found.

    t-SNE (van der Maaten and Hinton, 2008), started from the principal components; those alone
    for few points. Distances between far points mean little.
    """
    whole = _principal(points)
    places = np.zeros((len(points), 2), np.float32)
    places[:, : whole.shape[1]] = whole[:, :2]
    how = "the first two principal components"
    if len(points) >= _FEWEST:
        start = places * (_START / max(float(places.std()), _LEAST))
        places = (
            learning("manifold")
            .TSNE(2, perplexity=_PERPLEXITY, init=start, random_state=seed)
            .fit_transform(whole)
        )
        how = f"t-SNE with perplexity {_PERPLEXITY}, started from the principal components"
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return places.astype(np.float64) / max(float(np.abs(places).max()), _LEAST), how


def _principal(points: Floats) -> Floats:
    """The first principal components [N, <= 50], the largest first."""
    left, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    components: Floats = (left * sizes)[:, :_COMPONENTS]
    return components
